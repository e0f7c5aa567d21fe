"""Settings: as Python values, YAML and words of the command line. Oracle: PyYAML."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from fuzz_inputs import ACCEPTED, REFUSED, VALUES, Draw, Wrong, answered, damaged, edited, outcome, target
from hypothesis import strategies as st

import ewavit.compare.compare
import ewavit.study.bench
import ewavit.study.plan
import ewavit.training.export
import ewavit.training.loop
from ewavit.cli import main
from ewavit.training.recipe import Recipe, choices, kinds, settings
from ewavit.training.setting import flag

NAMES = [setting.name for setting in settings()]
_WORDS = st.sampled_from(
    [
        "1",
        "0",
        "-1",
        "2",
        "0.5",
        "1e-3",
        "nan",
        "inf",
        "1e400",
        "9" * 30,
        "",
        " ",
        "a",
        "adamw",
        "vit_tiny_patch16_224",
        "ewa",
        "dense,ewa",
        "dense",
        "topk",
        "replicas",
        "bfloat16",
        "a=1",
        "a=(1,2),b={",
        "patch_size=4",
        "=",
        "x" * 3000,
        "\udce9",
        "é",
        "\n",
        "--",
        "-",
        "=1",
        "0x10",
        "1_000",
        "٣",
        "True",
        "None",
        "/dev/null",
        "../up",
        "[" * 200,
    ]
)


class _Started(Exception):
    """A command got as far as its work; `what` was given to it."""

    def __init__(self, what: Any) -> None:
        self.what = what


def _prepare(folder: Path) -> Path:
    """From here on a command that accepts its input does no work."""

    def start(*given: Any, **more: Any) -> NoReturn:
        raise _Started(given[0] if given else more)

    ewavit.training.loop.train = start
    ewavit.training.loop.resume = start
    ewavit.study.plan.plan = start
    ewavit.study.bench.bench = start
    ewavit.compare.compare.compare = start
    ewavit.training.export.evaluate = start
    ewavit.training.export.export = start
    return folder


@contextlib.contextmanager
def _silent() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as problems,
    ):
        yield out, problems


def _command(words: list[str]) -> tuple[Any, str]:
    """What a command would work on, and the outcome; a refusal is exit status 2 and one line."""
    with _silent() as (out, problems):
        try:
            status = main(words)
        except _Started as started:
            return started.what, ACCEPTED
    said = problems.getvalue()
    if status == 2:
        if len(said.splitlines()) != 1 or not said.startswith("ewavit: ") or len(said) > 2100:
            raise Wrong(f"a refusal in {len(said.splitlines())} lines: {said!r:.300}")
        return None, REFUSED
    if status == 0 and ("--help" in words or "-h" in words or "--version" in words) and out.getvalue():
        return None, ACCEPTED
    raise Wrong(f"exit status {status} for {words!r:.200}: {said!r:.200}")


@target("settings: values from Python", 1.0)
def values(draw: Draw, folder: Path) -> str:
    given = draw(st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUES, _WORDS), min_size=1, max_size=3))
    found, refusal = answered(lambda: Recipe(**given))
    if found is not None:
        for name, value in given.items():
            _check(name, value, getattr(found, name))
        file = folder / "args.yaml"
        try:
            found.save(file)
        except UnicodeEncodeError:  # text that no file can hold
            raise Wrong(f"settings {given!r:.200} cannot be saved") from None
        again = Recipe.from_dict(yaml.safe_load(file.read_text()), "args.yaml")
        if again != found:
            raise Wrong(f"{given!r:.200} changed when it was saved")
    return outcome(refusal)


def _check(name: str, given: Any, kept: Any) -> None:
    """A setting that is accepted is kept as it was given."""
    if isinstance(given, dict) or (isinstance(given, str) and name == "model_kwargs"):
        return
    same = tuple(given) == kept if isinstance(given, list | tuple) else given == kept
    if not same and not (kinds()[name] is float and isinstance(given, int) and math.isclose(given, kept)):
        raise Wrong(f"{name} {given!r:.100} became {kept!r:.100}")


def _yaml_value(draw: Draw, name: str) -> Any:
    kind, named = kinds()[name], choices(name)
    right = {
        bool: st.booleans(),
        int: st.integers(-1, 40),
        float: st.floats(0, 2),
        str: st.text(max_size=5),
        tuple: st.lists(st.floats(0, 1), max_size=3),
    }[kind]
    if named:
        right = st.sampled_from(named)
    return draw(right if draw(st.integers(0, 3)) else VALUES)


@target("settings: YAML of a run", 0.15, _prepare)
def run_yaml(draw: Draw, folder: Path) -> str:
    content = {name: _yaml_value(draw, name) for name in draw(st.lists(st.sampled_from(NAMES), max_size=4))}
    hyphens = draw(st.booleans())
    file = folder / "a.yaml"
    written = {flag(name) if hyphens else name: value for name, value in content.items()}
    try:
        file.write_text(yaml.safe_dump(written, allow_unicode=draw(st.booleans())))
    except (yaml.YAMLError, UnicodeEncodeError):
        return "not written"
    found, how = _command(["train", "--config", str(file)])
    if found is not None:
        for name, value in content.items():
            typed = kinds()[name] is not str or isinstance(value, str)
            if value not in (None, "") and typed:
                _check(name, value, getattr(found, name))
    return how


_YAML = b"""# a recipe
model: vit_tiny_patch16_224
model-kwargs: {patch_size: 4, depth: 6}
epochs: 20
lr: 1.0e-3
betas: [0.9, 0.99]
amp: true
data: fashion-mnist-mini
select: alternate
"""
_COMPARISON = b"""
epochs: 3
arms:
  dense:
  ewa:
  gentle: {share_rate: 0.1, ramp: 0.2}
  moe-lr: {}
seeds: 3
lrs: [1.0e-3, 2e-3]
jobs: 1
"""
_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (98 + i, 98 + i, *[97 + i] * 9) for i in range(8)
)


@target("settings: damaged YAML", 0.2, _prepare)
def damaged_yaml(draw: Draw, folder: Path) -> str:
    command, data = draw(
        st.sampled_from([("train", _YAML), ("compare", _COMPARISON), ("plan", _YAML), ("train", _BOMB)])
    )
    if data is _BOMB and draw(st.booleans()):
        name = draw(st.sampled_from(["data", "epochs", "betas", "model_kwargs", "mean"]))
        data = data + b"%s: *i\n" % name.encode()
    file = folder / "a.yaml"
    file.write_bytes(damaged(draw, data) if draw(st.integers(0, 19)) else data)
    return _command([command, "--config", str(file)])[1]


@target("settings: YAML of a comparison", 0.15, _prepare)
def comparison_yaml(draw: Draw, folder: Path) -> str:
    content = edited(draw, yaml.safe_load(_COMPARISON))
    file = folder / "a.yaml"
    try:
        file.write_text(yaml.safe_dump(content))
    except (yaml.YAMLError, UnicodeEncodeError):
        return "not written"
    return _command(["compare", "--config", str(file)])[1]


@target("settings: words of the command line", 0.3, _prepare)
def command_line(draw: Draw, folder: Path) -> str:
    command = draw(st.sampled_from(["train", "plan", "bench", "compare", "evaluate", "export", "trian", ""]))
    words = [command]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            name = f"--{flag(draw(st.sampled_from(NAMES)))}"
            words += [f"{name}={draw(_WORDS)}"] if kind else [name, draw(_WORDS)]
        elif kind == 3:
            extra = [
                "--json",
                "--resume",
                "--config",
                "--devices",
                "--rounds",
                "--arms",
                "--seeds",
                "--lrs",
                "--jobs",
                "--preset",
                "--ray",
                "--to",
                "--confusion",
                "--per-class",
                "--help",
                "--collapse",
                "--no-amp",
                "--lr-",
            ]
            words += [draw(st.sampled_from(extra)), draw(_WORDS)]
        elif kind == 4:
            words.append(draw(_WORDS))
        else:
            words.append(draw(st.text(max_size=6)))
    return _command(words)[1]
