"""Run timm's own model tests on models that `ewavit.expand` changed.

    pip download --no-binary :all: --no-deps timm==VERSION      # the tests are in the sdist, not in the wheel
    python tools/timm_model_tests.py TESTS/test_models.py --mode expanded --record records/NAME.json

`timm.create_model` then gives models with experts that differ (`expanded`), such models collapsed again
(`collapsed`), or timm's own (`plain`, to see what fails without us). Models for the meta device are expanded
on the CPU first. An expanded model must refuse FX and TorchScript by one `EwavitError`. Tests that download
weights are left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import ewavit

# Small models of many families, so that a run takes minutes on one core.
MODELS = (
    "test_vit*", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
    "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s32_224", "pvt_v2_b0",
    "poolformer_s12", "levit_128s", "pit_ti_224", "edgenext_xx_small", "coat_tiny",
)  # fmt: skip
ONLINE = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")
MODES = ("plain", "expanded", "collapsed")
REFUSED = ("torch.fx cannot", "TorchScript cannot")


def expand(model: torch.nn.Module) -> None:
    """Expand all FFNs by token, or those that mix tokens by image; skip the test if there is none."""
    try:
        ewavit.expand(model, 3, select="all")
    except ewavit.EwavitError:
        try:
            ewavit.expand(model, 3, select="all", unit="image")
        except ewavit.EwavitError as problem:
            pytest.skip(f"nothing to expand: {str(problem).splitlines()[0]}")


def changed(mode: str, create: Any) -> Any:
    """`timm.create_model` as the tests shall see it."""

    @functools.wraps(create)
    def create_model(*args: Any, device: Any = None, **kwargs: Any) -> torch.nn.Module:
        wanted = torch.device(device) if device is not None else torch.get_default_device()
        with torch.device("cpu"):
            model: torch.nn.Module = create(*args, device="cpu" if device is not None else None, **kwargs)
            expand(model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".experts." in name:
                        parameter.add_(0.02 * torch.randn_like(parameter))
            if mode == "collapsed":
                ewavit.collapse(model)
        return model.to(wanted)

    return create_model if mode != "plain" else create


class Results:
    """A plugin for pytest: it leaves out other models and counts what came of the tests."""

    def __init__(self, mode: str, models: list[str]) -> None:
        self.mode, self.models = mode, models
        self.counts: dict[str, Counter[str]] = {}
        self.said: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def chosen(item: Any) -> bool:
            name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
            plain = (name or "").partition(".")[0]  # the tests of configurations name the weights, too
            return item.originalname not in ONLINE and any(fnmatch(plain, m) for m in self.models)

        items[:] = [item for item in items if chosen(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        report = yield
        if report.when != "call" and report.passed:
            return report
        outcome = str(report.outcome)
        said = str(call.excinfo.value).splitlines()[0] if call.excinfo and str(call.excinfo.value) else ""
        if report.skipped:
            outcome = "nothing to expand" if said.startswith("nothing to expand") else "skipped by timm"
        elif self.mode == "expanded" and call.excinfo and said.startswith(REFUSED):
            assert call.excinfo.errisinstance(ewavit.EwavitError)
            outcome, report.outcome = "refused", "passed"
        self.counts.setdefault(item.originalname, Counter())[outcome] += 1
        if outcome not in ("passed", "skipped by timm", "refused"):
            self.said[item.name if report.failed else item.callspec.params["model_name"]] = said[:300]
        return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tests", nargs="+", type=Path, help="timm's tests/test_models.py, of the installed version"
    )
    parser.add_argument("--mode", choices=MODES, default="expanded")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names or patterns")
    parser.add_argument("--record", type=Path, help="JSON file; each mode is one entry in it")
    given = parser.parse_args()
    timm.create_model = changed(given.mode, timm.create_model)
    torch.manual_seed(0)
    results, start = Results(given.mode, given.models), time.process_time()
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short"]
    status = int(pytest.main([*map(str, given.tests), *options], plugins=[results]))
    figures = {
        "tests": {name: dict(sorted(counts.items())) for name, counts in sorted(results.counts.items())},
        "all": dict(sorted(sum(results.counts.values(), Counter()).items())),
        "not passed": dict(sorted(results.said.items())),
        "seconds of CPU": round(time.process_time() - start),
    }
    print(json.dumps(figures, indent=2))
    if given.record:
        record = json.loads(given.record.read_text()) if given.record.exists() else {}
        record["command"] = "python tools/timm_model_tests.py TESTS/test_models.py --mode MODE --record FILE"
        record["versions"] = {name: version(name) for name in ("ewavit", "timm", "torch")}
        record["models"] = given.models
        record[given.mode] = figures
        given.record.write_text(json.dumps(record, indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
