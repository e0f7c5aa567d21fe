"""`Judge`: the judging metric of a task, with its name, unit and direction."""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 2e-4  # of values with four decimals, as summary.csv has them


@dataclass(frozen=True)
class Judge:
    """The judging metric of a task.

    Attributes:
        column: its name in files, e.g. "top1": `eval_top1` in summary.csv, `top1` in results.csv.
        name: its name in sentences, e.g. "top-1".
        unit: unit of its values, e.g. "%".
        difference_unit: unit of a difference between two values, e.g. "points".
        higher_is_better: False for a metric such as an error rate.
        bounds: the least and the greatest possible value; None if there are none.
        share_of_samples: whether a value is the percentage of samples with a right prediction. It comes in
            steps of 100 / samples.
        digits: digits after the point of a value, and of a difference between two values.
        rounding: how far apart equal differences may be, because values are written with few decimals.
    """

    column: str
    name: str
    unit: str = "%"
    difference_unit: str = "points"
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    share_of_samples: bool = False
    digits: int = 2
    rounding: float = ROUNDING

    @property
    def sign(self) -> int:
        """1 if a higher value is better, else -1."""
        return 1 if self.higher_is_better else -1

    def text(self, value: float) -> str:
        """A value with its unit, e.g. "86.20 %"."""
        return f"{value:.{self.digits}f} {self.unit}".rstrip()

    def signed(self, difference: float) -> str:
        """A difference between two values with its sign, e.g. "+0.45"."""
        return f"{difference:+.{self.digits}f}"


TOP1 = Judge("top1", "top-1", bounds=(0, 100), share_of_samples=True)
MIOU = Judge("miou", "mIoU", bounds=(0, 100))
RECALL1 = Judge("recall1", "Recall@1", bounds=(0, 100))
INSTANCE_IOU = Judge("instance_iou", "instance mIoU", bounds=(0, 100))
