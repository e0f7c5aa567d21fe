"""Comparisons of runs that other programs trained."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ewavit.cli import main
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.outside import Source, read_comparison
from ewavit.compare.statistics import summarise
from ewavit.errors import EwavitError

VALUES = {("base", 0): 0.801, ("base", 1): 0.789, ("base", 2): 0.812, ("base", 3): 0.796}
VALUES |= {("new-lr", seed): value + 0.004 + seed / 2000 for (_, seed), value in VALUES.items()}


def table(folder, rows=None, head="arm,seed,accuracy,loss"):
    rows = rows or [f"{arm},{seed},{value:.4f},{1 - value:.4f}" for (arm, seed), value in VALUES.items()]
    (folder / "t.csv").write_text("\n".join([head, *rows]) + "\n")
    return f"{folder}/t.csv:accuracy"


def timm_logs(folder):
    for (arm, seed), value in VALUES.items():
        log = folder / f"{arm}-{seed}" / "summary.csv"
        log.parent.mkdir()
        lines = [f"{epoch},0.5,{1 - value:.4f},{value - (2 - epoch) / 10:.4f}" for epoch in (0, 1, 1, 2)]
        log.write_text("\n".join(["epoch,train_loss,eval_loss,accuracy", *lines]) + "\n")
    return f"{folder}/{{arm}}-{{seed}}/summary.csv:accuracy"


def trainer_states(folder):
    for (arm, seed), value in VALUES.items():
        log = folder / arm / f"seed{seed}" / "trainer_state.json"
        log.parent.mkdir(parents=True)
        entry = {"step": 20, "accuracy": round(value, 4), "eval_loss": round(1 - value, 4)}
        log.write_text(
            json.dumps({"log_history": [{"step": 20, "loss": 0.1}, entry, {"step": 20, "flos": 1}]})
        )
    return f"{folder}/{{arm}}/seed{{seed}}/trainer_state.json:accuracy"


def lightning_logs(folder):
    for (arm, seed), value in VALUES.items():
        log = folder / arm / f"version_{seed}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        rows = ["epoch,step,train_loss,accuracy,val_loss", "0,9,0.3,,", f"0,10,,{value:.4f},{1 - value:.4f}"]
        log.write_text("\n".join(rows) + "\n")
    return f"{folder}/{{arm}}/*_{{seed}}/metrics.csv:accuracy"


def tensorboard_events(folder):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for (arm, seed), value in VALUES.items():
        writer = EventFileWriter(str(folder / f"{arm}-{seed}"))
        scalars = {"accuracy": round(value, 4), "val_loss": round(1 - value, 4)}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()])
        writer.add_event(Event(wall_time=1.0, step=5, summary=summary))
        writer.close()
    return f"{folder}/{{arm}}-{{seed}}:accuracy"


def judged(text, **more):
    return read_comparison(Source.parse(text), name="x", command="ewavit compare", **more)


@pytest.mark.parametrize("write", [timm_logs, trainer_states, lightning_logs, tensorboard_events])
def test_every_reader_gives_what_a_table_of_the_same_numbers_gives(tmp_path, write):
    (expected,) = summarise(judged(table(tmp_path))).against["base"]
    (tmp_path / "logs").mkdir()
    comparison = judged(write(tmp_path / "logs"))
    (pair,) = summarise(comparison).against["base"]
    assert (pair.arm, pair.seeds) == ("new-lr", (0, 1, 2, 3))
    assert pair.differences == pytest.approx(expected.differences, abs=1e-6)
    assert pair.interval == pytest.approx(expected.interval, abs=1e-6)
    assert pair.loss.mean == pytest.approx(expected.loss.mean, abs=1e-6)
    assert comparison.arms[0].runs[0].curve[-1].images > 0


def test_a_row_that_a_resumed_run_wrote_again_counts_once(tmp_path):
    curve = judged(timm_logs(tmp_path)).arms[0].runs[0].curve
    assert [point.images for point in curve] == [1, 2, 3]
    assert curve[-1].metric == pytest.approx(0.801)


def test_the_command_judges_without_torch_and_writes_the_page(tmp_path):
    words = ["compare", "--from", table(tmp_path), "--output", str(tmp_path), "--name", "judged"]
    script = "import sys; from ewavit.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert "new-lr helps: +0.004" in done.stdout
    assert {file.name for file in (tmp_path / "judged").iterdir()} == {
        "report.html",
        "results.csv",
        "results.json",
    }
    found = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert found["judge"]["column"] == "accuracy"
    assert found["arms"][1]["runs"][0]["accuracy"] == pytest.approx(0.805)


def test_a_lower_value_is_better_only_where_it_is_said(tmp_path):
    text = table(tmp_path).replace(":accuracy", ":loss")
    with pytest.raises(EwavitError, match="--lower-is-better"):
        judged(text)
    for lower, outcome in ((True, "helps"), (False, "hurts")):
        (verdict,) = summarise(judged(text, lower_is_better=lower)).verdicts
        assert verdict.outcome == outcome


def test_a_verdict_does_not_depend_on_the_unit_of_the_metric(tmp_path):
    """A gain of about 0.1 points at five seeds: as a share, its spread is below that of four decimals."""
    gains, outcomes, p_values = (0.00101, 0.00104, 0.00097, 0.00099, 0.00103), [], []
    for scale in (1, 100):
        rows = [f"base,{seed},{scale * (0.8 + seed / 1000):.7f}" for seed in range(5)]
        rows += [f"new,{seed},{scale * (0.8 + seed / 1000 + gain):.7f}" for seed, gain in enumerate(gains)]
        found = summarise(judged(table(tmp_path, rows, "arm,seed,accuracy")))
        outcomes.append(found.verdicts[0].outcome)
        p_values.append(found.against_reference[0].p_value)
    assert outcomes == ["helps", "helps"]
    assert p_values[0] == pytest.approx(p_values[1], rel=1e-3)


def test_values_with_few_decimals_that_differ_alike_are_no_proof_at_five_seeds(tmp_path):
    rows = [f"{arm},{seed},{0.8 + seed / 100 + gain:.2f}" for arm, gain in (("base", 0), ("new", 0.01))
            for seed in range(5)]  # fmt: skip
    found = summarise(judged(table(tmp_path, rows, "arm,seed,accuracy")))
    assert found.verdicts[0].outcome == "untold"


def test_the_reference_is_the_one_named_or_usual_or_first(tmp_path):
    rows = [f"{arm},{seed},0.{seed}{i},1" for i, arm in enumerate(("a", "dense", "c")) for seed in range(3)]
    text = table(tmp_path, rows)
    assert summarise(judged(text)).reference == "dense"
    assert summarise(judged(text, contrasts=Contrasts(reference="c"))).reference == "c"
    assert summarise(judged(table(tmp_path))).reference == "base"


def test_a_run_without_a_finite_value_is_left_out_and_named(tmp_path, capsys):
    rows = [
        f"{arm},{seed},{'nan' if (arm, seed) == ('b', 1) else 0.5 + seed / 9},1"
        for arm in "ab"
        for seed in range(3)
    ]
    words = ["compare", "--from", table(tmp_path, rows), "--output", str(tmp_path), "--name", "j"]
    assert main(words) == 1
    assert "failed: b, seed 1: accuracy is 'nan'" in capsys.readouterr().out


def test_predictions_beside_the_table_give_mcnemars_test(tmp_path):
    rows = []
    for arm in "ab":
        for seed in range(2):
            right = [i < (6 if arm == "a" else 9) for i in range(10)]
            lines = [f"{i % 3},{i % 3 if ok else 3}" for i, ok in enumerate(right)]
            (tmp_path / f"{arm}{seed}.csv").write_text("\n".join(["label,prediction", *lines]) + "\n")
            rows.append(f"{arm},{seed},{sum(right) / 10},{arm}{seed}.csv")
    text = table(tmp_path, rows, "arm,seed,accuracy,predictions")
    (pair,) = summarise(judged(text)).against["a"]
    assert (pair.mcnemar.only_arm, pair.mcnemar.only_reference) == (6, 0)


@pytest.mark.parametrize(
    ("head", "rows", "column", "said"),
    [
        ("arm,seed,accuracy", ["a,0,1", "b,x,1"], "accuracy", "line 3: the seed 'x' is no whole number"),
        ("arm,seed,accuracy", ["a,0,1", "a,0,2", "b,0,1"], "accuracy", "arm a, seed 0 is there twice"),
        ("arm,seed,accuracy", ["a,0,1", "a,1,2"], "accuracy", "only the arm 'a'"),
        ("arm,seed,accuracy", ["a,0,1"], "top9", "has no top9"),
        ("arm,accuracy", ["a,1"], "accuracy", "has no seed"),
        ("arm,seed,accuracy,predictions", ["a,0,1,none.csv", "b,0,1,none.csv"], "accuracy", "none.csv"),
    ],
)
def test_a_wrong_table_is_said_in_one_line(tmp_path, capsys, head, rows, column, said):
    text = table(tmp_path, rows, head).replace(":accuracy", f":{column}")
    assert main(["compare", "--from", text, "--output", str(tmp_path), "--name", "j"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "t.csv"], "names no metric"),
        (["--from", "{arm}/s.csv:a"], "only one of {arm} and {seed}"),
        (["--from", "nowhere/{arm}-{seed}.csv:a"], "there is no folder nowhere"),
        (["--from", "nowhere.csv:a"], "cannot be read as CSV"),
        (["--from", "t.csv:a", "--epochs", "3"], "--epochs does not go with --from"),
        (["--from", "t.csv:a", "--primary", "a:b"], "name it before them"),
        (["--from", "t.csv:a", "--preset", "demo"], "--preset does not go with --from"),
        (["--lower-is-better"], "--lower-is-better goes with --from"),
    ],
)
def test_wrong_words_are_said_in_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_trained_comparison_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    assert main(["compare", "--from", table(tmp_path), "--output", str(tmp_path), "--name", "mine"]) == 2
    assert "holds a comparison that was trained" in capsys.readouterr().err


def test_the_example_of_the_page_runs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "any_training.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    loop = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[-1]
    (tmp_path / "train.py").write_text(script)
    here = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, words in (("python", ""), ("ewavit", " -m ewavit.cli")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-ec", loop], cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "high-lr helps" in done.stdout
