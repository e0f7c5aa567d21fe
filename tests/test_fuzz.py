"""Every reader of files and settings refuses odd input in words; tests/faults/fuzz.py tries more of it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("faults")))

import fuzz
from fuzz_inputs import TARGETS

SLOW = ("comparison: results with hostile words", "weights: model cards")


@pytest.mark.parametrize("name", TARGETS)
def test_odd_input_is_refused_in_words_or_read_right(name):
    counts, findings = fuzz.run(TARGETS[name], seed=12, cases=4 if name in SLOW else 40)
    assert not findings
    assert counts["cases"] >= 4
