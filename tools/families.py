"""Which model families `ewavit.expand` works on: each is built, expanded, trained a step and collapsed.

    python tools/families.py                        run all, write records/families.json and docs/families.md
    python tools/families.py --only BERT "vit-pytorch"      these alone (parts of names), written nowhere
    python tools/families.py --page                 write the page from the record

It needs open_clip_torch, vit-pytorch, diffusers and segmentation-models-pytorch besides `ewavit[dev]`.
A family passes if the eval output of the expanded model is that of the plain model before training and of the
collapsed model after a step, every expert has a gradient, and collapse gives the original keys and classes.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ewavit
from ewavit.core import moe_layers
from ewavit.core.ffn import FFN, find_ffns

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import family_others  # noqa: E402
from family import Family  # noqa: E402
from family_transformers import of_transformers  # noqa: E402

RECORD, PAGE = ROOT / "records/families.json", ROOT / "docs/families.md"
PACKAGES = ("torch", "timm", "torchvision", "transformers", "open_clip_torch", "vit-pytorch", "diffusers",
            "segmentation-models-pytorch")  # fmt: skip
EXPERTS, TOLERANCE = 2, 1e-4


_PAGE = """# Model families

{count} families, small and with random weights: {head}.
Each one was expanded, trained for a step with averaging, evaluated and collapsed. The eval output equals that
of the plain model before the step and that of the collapsed model after it. Keys and classes are the original
ones after collapse. `python tools/families.py` writes this page and its [record](../records/families.json).
Versions: {packages}.

*Two layers*: the FFN is two linear layers of a block, such as `fc1` and `fc2`, and no module of its own. Both
layers become mixtures with one draw, so they equal one mixture of the whole FFN. What is between and around
them (activation, dropout, norm, residual connection) stays as it is. A learned router is refused there.
*Left dense*: what `expand` leaves as it was in a model that works.
"""


def all_families() -> list[Family]:
    """Every family, by library."""
    sources = [of for name, of in vars(family_others).items() if name.startswith("of_")]
    found = (family for source in (of_transformers, *sources) for family in source())
    return sorted(found, key=lambda family: (family.library.lower(), family.name.lower()))


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def run(model: nn.Module, family: Family) -> list[Tensor]:
    """What a model makes of the family's inputs, the same at every call."""
    torch.manual_seed(1)
    args, kwargs = family.inputs()
    return list(tensors(model(*args, **kwargs)))


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest relative distance of two outputs."""
    pairs = zip(first, second, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def classes(model: nn.Module) -> dict[str, type]:
    """The class of each module by name, shared ones under all their names."""
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def candidates(model: nn.Module) -> tuple[list[FFN], str]:
    """The FFNs that work, and the most common reason among the others that are no head and no attention."""
    found = find_ffns(model)
    reasons = [ffn.reason for ffn in found if ffn.unit is None and "not an FFN" not in ffn.reason]
    return [ffn for ffn in found if ffn.unit], max(reasons, key=reasons.count, default="")


def check(family: Family) -> dict[str, Any]:
    """Expand, train a step with averaging, evaluate and collapse one family."""
    torch.manual_seed(0)
    dense = family.build()
    with torch.no_grad():
        for parameter in dense.parameters():  # zeros at the start would hide mistakes
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    usable, reason = candidates(dense)
    by_token = sum(ffn.unit == "token" for ffn in usable)
    verdict = "refused" if not usable else "token" if 2 * by_token >= len(usable) else "image"
    result: dict[str, Any] = {"library": family.library, "name": family.name, "verdict": verdict}
    if verdict == "refused":
        try:
            ewavit.expand(dense)
        except ewavit.EwavitError as error:
            said = str(error).splitlines()[0]
            nothing = said[said.find("no module looks") :].rpartition("; ")[0]
            return result | {"reason": reason or nothing or said.partition("; ")[2]}
        return result | {"failed": "expand does not refuse what find_ffns does"}
    chosen = [ffn for ffn in usable if verdict == "image" or ffn.unit == "token"]
    result |= {"ffns": len(chosen), "split": any(ffn.pair for ffn in chosen)}
    if left := {ffn.reason for ffn in usable if ffn not in chosen} | ({reason} if reason else set()):
        result["left dense"] = "; ".join(sorted(left))
    keys, kinds = list(dense.state_dict()), classes(dense)
    model = ewavit.expand(copy.deepcopy(dense), EXPERTS, select="all", unit=verdict)  # type: ignore[arg-type]
    with torch.no_grad():
        before = distance(run(model.eval(), family), run(dense.eval(), family))
    optimizer = torch.optim.AdamW(ewavit.param_groups(model), lr=1e-3)
    ewavit.ExpertAveraging(model, 0.1).attach(optimizer)
    outputs = run(model.train(), family)
    torch.stack(
        [output.float().square().mean() for output in outputs if output.requires_grad]
    ).sum().backward()
    idle = [name for name, moe in moe_layers(model).items() if any(p.grad is None for p in moe.parameters())]
    optimizer.step()
    spread = ewavit.expert_spread(model)
    with torch.no_grad():
        expected = run(model.eval(), family)
        after = distance(run(ewavit.collapse(model).eval(), family), expected)
    same = list(model.state_dict()) == keys and classes(model) == kinds
    problems = {
        f"eval differs by {before:.1e} from the plain model": before > TOLERANCE,
        f"collapse differs by {after:.1e} from eval": after > TOLERANCE,
        "other keys or classes after collapse": not same,
        f"no gradient in {idle[:1]}": bool(idle),
        "experts that do not differ": min(spread.values()) == 0 and not idle,
    }
    failed = [words for words, wrong in problems.items() if wrong]
    return result | ({"failed": "; ".join(failed)} if failed else {})


def page(record: dict[str, Any]) -> str:
    """docs/families.md from the record."""
    rows, counts = record["families"], record["counts"]
    names = {"token": "works", "image": 'works with `unit="image"`', "refused": "refused"}
    head = (
        f'{counts["token"]} work, {counts["image"]} work with `unit="image"`, {counts["refused"]} are refused'
    )
    lines = [_PAGE.format(count=len(rows), head=head, packages=record["packages"])]
    for library in sorted({row["library"] for row in rows}, key=str.lower):
        lines += [f"## {library}", "", "| family | verdict | FFNs | reason |", "|---|---|---|---|"]
        for row in (row for row in rows if row["library"] == library):
            layers = f"{row['ffns']}{', two layers' if row['split'] else ''}" if "ffns" in row else ""
            left = f"left dense: {row['left dense']}" if "left dense" in row else ""
            why = (row.get("reason") or left).replace("|", "\\|")
            lines.append(f"| {row['name']} | {names[row['verdict']]} | {layers} | {why} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def measured(families: list[Family]) -> list[dict[str, Any]]:
    """The result of each family, printed as it comes."""
    rows = []
    for family in families:
        begun = time.process_time()
        try:
            row = check(family)
        except Exception as problem:
            first = (str(problem).splitlines() or [""])[0]
            row = {"library": family.library, "name": family.name, "verdict": "failed",
                   "failed": f"{type(problem).__name__}: {first[:200]}"}  # fmt: skip
        rows.append(row)
        said = row.get("failed") or row.get("reason") or row.get("left dense", "")
        seconds = time.process_time() - begun
        verdict = "FAILED" if "failed" in row else row["verdict"]
        print(f"{verdict:8}{family.library} {family.name} ({seconds:.1f} s) {said}", flush=True)
    return rows


def versions() -> str:
    """The installed versions of the libraries."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="parts of `LIBRARY NAME`; nothing is written")
    parser.add_argument("--page", action="store_true", help="write the page from the record, and run nothing")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not given.page:
        families = all_families()
        wanted = [f for f in families if any(word in f"{f.library} {f.name}" for word in given.only or [""])]
        rows = measured(wanted)
        failed = sum("failed" in row for row in rows)
        verdicts = [row["verdict"] for row in rows]
        print(f"{len(rows)} families, {failed} failed")
        if given.only or failed:
            return int(bool(failed))
        counts = {verdict: verdicts.count(verdict) for verdict in ("token", "image", "refused")}
        record = {"command": "python tools/families.py", "python": platform.python_version(),
                  "packages": versions(), "counts": counts, "families": rows}  # fmt: skip
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
