"""`Contrasts`: which arms are judged against which, and which contrast was named before the runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ewavit.errors import EwavitError

Contrast = tuple[str, str]  # an arm and its reference


@dataclass(frozen=True)
class Contrasts:
    """What is judged against what.

    Attributes:
        reference: all arms are judged against this one; None: against dense, and methods against the best
            control too.
        named: an arm and its reference each; if there are any, these are judged and no others.
        primary: the contrast named before the runs. It is judged alone: its p-value is not corrected.
    """

    reference: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    primary: Contrast | None = None

    @classmethod
    def parse(cls, against: str | None, named: Iterable[str], primary: str | None) -> Contrasts:
        """Contrasts from words: an arm, and "ARM:REFERENCE" texts.

        Raises:
            EwavitError: a text is no contrast, or two have the same arm.
        """
        pairs = [_contrast(text, "--contrasts") for text in named]
        if double := [arm for arm, _ in pairs if [other for other, _ in pairs].count(arm) > 1]:
            raise EwavitError(f"--contrasts names {double[0]} twice: give each arm one reference")
        return cls(against, dict(pairs), _contrast(primary, "--primary") if primary else None)

    def check(self, arms: Iterable[str]) -> None:
        """Check the names.

        Raises:
            EwavitError: an arm is not among `arms`, or dense is missing and no other reference is named.
        """
        known = tuple(arms)
        sides = [side for pair in self.all() for side in pair]
        for name in (*([self.reference] if self.reference else []), *sides):
            if name not in known:
                raise EwavitError(f"{name} is judged and missing in --arms {','.join(known)}: add it")
        if not self.reference and not sides and "dense" not in known:
            raise EwavitError(
                f"dense is missing in --arms {','.join(known)}: add it, all other arms are compared with it, "
                "or name another reference with --against"
            )

    def all(self) -> tuple[Contrast, ...]:
        """The named contrasts, the primary one first."""
        first = (self.primary,) if self.primary else ()
        return (*first, *(pair for pair in self.named.items() if pair != self.primary))


def _contrast(text: str, flag: str) -> Contrast:
    arm, colon, reference = text.partition(":")
    if not colon or not arm or not reference or arm == reference:
        raise EwavitError(f"{flag} {text} is no contrast: write ARM:REFERENCE, e.g. moe+early-ewa:moe")
    return arm, reference
