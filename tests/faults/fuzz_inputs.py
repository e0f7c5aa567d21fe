"""What the fuzzed readers share: damaged bytes and JSON, the answer of a reader, the list of targets."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ewavit.errors import EwavitError

Draw = Callable[[st.SearchStrategy[Any]], Any]
REFUSED, ACCEPTED = "refused", "accepted"


class Wrong(Exception):
    """A reader gave a wrong result without a word."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: of the kind of input.
        share: of all cases, relative to the other targets.
        prepare: writes the files that all cases share into a folder, and returns what a case needs.
        case: draws one input, gives it to the reader, and says whether that accepted it.
    """

    name: str
    share: float
    prepare: Callable[[Path], Any]
    case: Callable[[Draw, Any], str]


TARGETS: dict[str, Target] = {}


def target(
    name: str, share: float = 1.0, prepare: Callable[[Path], Any] = lambda folder: folder
) -> Callable[[Callable[[Draw, Any], str]], Callable[[Draw, Any], str]]:
    """A decorator that lists the function of a case in `TARGETS`."""

    def listed(case: Callable[[Draw, Any], str]) -> Callable[[Draw, Any], str]:
        TARGETS[name] = Target(name, share, prepare, case)
        return case

    return listed


def answered(read: Callable[[], Any], *refusals: type[Exception]) -> tuple[Any, Exception | None]:
    """What a reader returns, or its refusal: an `EwavitError` or one of `refusals`.

    Raises:
        MemoryError: the refusal hides that there was no memory.
        Wrong: the refusal says nothing.
    """
    try:
        return read(), None
    except (EwavitError, *refusals) as problem:
        cause: BaseException | None = problem
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise MemoryError(f"behind the refusal {problem}") from problem
            cause = cause.__cause__ or cause.__context__
        if not str(problem).strip():
            raise Wrong("an error without a message") from problem
        return None, problem


def outcome(refusal: Exception | None) -> str:
    return ACCEPTED if refusal is None else REFUSED


# --- damage ---

_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
_TOKENS = (
    b"nan",
    b"inf",
    b"-inf",
    b"-1",
    b"0",
    b"1e400",
    b"1e-400",
    b"2e38",
    b"1e30",
    b"99999999999999999999",
    b"1_0",
    b"0x10",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b"\r\n",
    b"\r",
    b" ",
    b"\t",
    b",",
    b";",
    b'"',
    b"'",
    b"[",
    b"{",
    b"]",
    b"}",
    b":",
    b"#",
    b"//",
    b"\xef\xbb\xbf",
    b"None",
    b"null",
    b"true",
    b"=cmd",
    b"../",
    b"/etc/passwd",
    "٣".encode(),
    b"A" * 300,
    b"[" * 3000,
    b'{"a":' * 3000,
)
_OPERATIONS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 2**16), st.integers(0, 2**16)), min_size=1, max_size=5
)


def damaged(draw: Draw, data: bytes) -> bytes:
    """One to five damages: bits, bytes, numbers, pieces taken out or in, words, truncation."""
    result = bytearray(data)
    for kind, where, what in draw(_OPERATIONS):
        # half of the places are among the first bytes, where headers are
        size = len(result) if where % 2 else min(len(result), 128)
        place = (where // 2) % size if size else 0
        end = min(len(result), place + what % 64 + 1)
        number = _NUMBERS[what % len(_NUMBERS)]
        if kind == 0 and result:
            result[place] ^= 1 << what % 8
        elif kind == 1 and result:
            result[place] = what % 256
        elif kind == 2:
            width = (1, 2, 4, 8)[what // len(_NUMBERS) % 4]
            value = (number % 256**width).to_bytes(width, ("little", "big")[what % 2])
            result[place : place + width] = value
        elif kind == 3:
            del result[place:end]
        elif kind == 4:
            result[place:place] = result[place:end]
        elif kind == 5:
            result[place:place] = _TOKENS[what % len(_TOKENS)]
        elif kind == 6:
            del result[place:]
        elif kind == 7:  # another number in the place of one that is written in digits
            found = [match.span() for match in re.finditer(rb"\d+", result[:100_000])]
            if found:
                begin, stop = found[where % len(found)]
                text = (str(number), str(-number), f"{number}.5", "1e400")[what // len(_NUMBERS) % 4]
                result[begin:stop] = text.encode()
        elif what % 16:  # two pieces change places
            other = (where * 31 + what) % (len(result) + 1)
            result[place:end], result[other : other + 8] = result[other : other + 8], result[place:end]
        else:
            result.clear()
    return bytes(result)


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        ["", "a", "-1", "nan", "\ud800", "\0", "../up", "/etc/passwd", "x" * 2000, "http://a/b", "é"]
    ),
    st.text(max_size=8),
)
VALUES = st.one_of(
    _LEAVES,
    st.lists(_LEAVES, max_size=3),
    st.dictionaries(st.text(max_size=4), _LEAVES, max_size=3),
    st.sampled_from([[[[[[]]]]], {"a": {"b": {}}}, [0] * 500]),
)
_EDITS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**16), VALUES), min_size=1, max_size=3)


def edited(draw: Draw, content: Any) -> Any:
    """JSON content with one to three edits: values replaced, keys lost, renamed or added, nested anew."""
    content = copy.deepcopy(content)
    for kind, where, drawn in draw(_EDITS):
        value = copy.deepcopy(drawn)
        places = list(_places(content))
        if not places:
            return value
        holder, key = places[where % len(places)]
        if kind <= 2:
            holder[key] = value
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
        else:
            holder[key] = [holder[key]] if where % 3 else {"a": holder[key]}
    return content


def _places(content: Any) -> Any:
    """Every place in the content that holds a value, as its holder and key."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])
