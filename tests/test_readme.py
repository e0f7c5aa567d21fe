"""What the README shows runs as it stands, and its figures are those of its records."""

import ast
import json
import re
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def record(name):
    return json.loads((ROOT / "records" / name).read_text())


def against_dense(name, arm):
    rows = record(name)["statistics"]["against_reference"]
    return next(row for row in rows if row["arm"] == arm)


def test_the_three_lines_give_the_original_model_back():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    dense = timm.create_model("vit_small_patch16_224", num_classes=100)
    dense.load_state_dict(names["model"].state_dict(), strict=True)
    assert [type(m) for m in dense.modules()] == [type(m) for m in names["model"].modules()]
    assert isinstance(names["optimizer"], torch.optim.AdamW)


def test_every_record_that_the_readme_names_exists_and_has_its_command():
    named = set(re.findall(r"records/([\w.-]+\.json)", README))
    assert named
    assert all(record(name)["command"] for name in named)


def test_every_file_that_the_readme_links_to_exists():
    links = set(re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README))
    files = {link for link in links if not link.startswith("https://")}
    assert len(files) > 10
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []


def test_the_costs_are_those_of_their_records():
    def step(name):
        return record(name)["result"]["arms"]["ewa-4"]["step"]["ratio"]

    assert f"takes {step('step_time-cpu-ti64-compiled.json'):.3f} times as long" in README
    every = {file.name: step(file.name) for file in (ROOT / "records").glob("step_time-cpu-*-compiled.json")}
    assert max(every, key=every.get) == "step_time-cpu-l-compiled.json"
    assert f"{max(every.values()):.2f} times as long" in README
    assert f"take {record('memory-cpu.json')['result']['saved_ratio']:.4f} times the memory" in README


def test_the_gain_and_the_loss_of_fine_tuning_are_those_of_the_record():
    against = record("compare-few-images.json")["statistics"]["against"]
    for reference, verb in (("dense", "gain"), ("drop-path", "lose")):
        (found,) = (row for row in against[reference] if row["arm"] == "rup-image")
        low, high = sorted(map(abs, found["interval"]))
        assert found["interval"][0] > 0 if verb == "gain" else found["interval"][1] < 0
        words = (
            rf"{verb} {abs(found['mean']):.2f}(?: points)? \[{low:.2f}, {high:.2f}\] (?:over plain|to) dense"
        )
        assert re.search(words, " ".join(README.split()))


def test_no_variant_gained_from_scratch_in_the_record():
    screening = record("compare-screening.json")["statistics"]["against_reference"]
    methods = [row for row in screening if row["arm"] != "dense-lr"]
    assert len(methods) >= 10
    assert all(row["interval"][0] <= 0 for row in methods)


def test_the_table_of_the_comparison_is_that_of_its_record():
    statistics = record("compare-mini.json")["statistics"]
    (table,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    shown = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert list(shown) == [arm["name"] for arm in statistics["arms"]]
    for arm in statistics["arms"]:
        words = [f"{arm['mean']:.2f}", "±", f"{arm['sd']:.2f}", "%"]
        if arm["name"] != "dense":
            row = against_dense("compare-mini.json", arm["name"])
            low, high = row["interval"]
            words += [f"{row['mean']:+.2f}", f"[{low:+.2f},", f"{high:+.2f}]", f"{row['holm_p']:.3f}"]
        assert shown[arm["name"]] == [*words, f"{arm['seconds']:.0f}"]
    assert "whether ewa helps cannot be told" in statistics["claim"]
    assert "whether EWA helps here cannot be told" in README


def test_the_suite_tries_as_many_models_as_the_readme_says():
    tree = ast.parse((ROOT / "tests" / "test_models.py").read_text())
    (families,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FAMILIES"
    ]
    assert f"small versions of {len(families.keys)} models" in README
    counts = json.loads((ROOT / "records/families.json").read_text())["counts"]
    assert f"{counts['token'] + counts['image']} of {sum(counts.values())} families" in README


def test_the_table_of_frameworks_is_that_of_its_page_without_empty_rows():
    page = (ROOT / "docs" / "where_you_train.md").read_text().partition("## What is tested")[2]
    of_page = [row.replace("](../", "](") for row in re.findall(r"^\|.*", page, re.MULTILINE)]
    shown = re.findall(
        r"^\|.*", README.partition("## Where you train already")[2].partition("\n## ")[0], re.M
    )
    assert shown == [row for row in of_page if row.strip("|- ") == "" or "yes" in row or "FSDP2" in row]
    cells = re.findall(r"\[[^]]+\]\((tests/\w+\.py)\)", "\n".join(shown))
    assert len(cells) > 30
    assert all((ROOT / cell).exists() for cell in cells)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 100
