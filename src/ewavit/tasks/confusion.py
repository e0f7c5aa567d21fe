"""`Confusion`: how often each class was predicted for each class, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ewavit.files import csv_text, replacing

NUMBERED = 20  # classes of the largest picture that has the counts in its cells
NAMED = 60  # classes of the largest picture that has their names


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        classes: names of the classes.
        counts: number of inputs, (true class, predicted class).
        kind: kind of the inputs, "images" or "clouds".
    """

    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    kind: str

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: its inputs, recall and precision in percent, and the most frequent mistake.

        A share of no inputs, and the mistake of a class without mistakes, are None.
        """
        rows = []
        for label, name in enumerate(self.classes):
            right, inputs = int(self.counts[label, label]), int(self.counts[label].sum())
            predicted = int(self.counts[:, label].sum())
            wrong = self.counts[label].copy()
            wrong[label] = 0
            most = int(wrong.argmax())
            rows.append(
                {
                    "class": name,
                    self.kind: inputs,
                    "recall": round(100 * right / inputs, 4) if inputs else None,
                    "precision": round(100 * right / predicted, 4) if predicted else None,
                    "mistaken_for": self.classes[most] if wrong[most] else None,
                    "times": int(wrong[most]),
                }
            )
        return rows

    def table(self) -> str:
        """`per_class` as text."""
        width = max(len("class"), *map(len, self.classes))
        lines = [f"{'class':{width}}  {self.kind:>7}    recall  precision  most often mistaken for"]
        for row in self.per_class():
            recall, precision = (
                "-" if row[name] is None else f"{row[name]:.2f} %" for name in ("recall", "precision")
            )
            wrong = "-" if row["mistaken_for"] is None else f"{row['mistaken_for']} ({row['times']:,})"
            lines.append(
                f"{row['class']:{width}}  {row[self.kind]:>7,}  {recall:>8}  {precision:>9}  {wrong}"
            )
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write a CSV file: a row for each true class, a column for each predicted class, see `csv_text`."""
        names = [csv_text(name) for name in self.classes]
        with (
            replacing(path) as partial,
            partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
        ):
            writer = csv.writer(handle)
            writer.writerow(("class", *names))
            writer.writerows((name, *row) for name, row in zip(names, self.counts.tolist(), strict=True))

    def draw(self, path: Path, title: str) -> None:
        """Draw the matrix as a picture; a row's colours are shares of the true class."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        size = len(self.classes)
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        side = min(max(4.0, 0.42 * size), 16.0)
        figure, axis = pyplot.subplots(figsize=(side + 2, side + 1), layout="constrained")
        drawn = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(drawn, ax=axis, label="% of the true class", shrink=0.8)
        if size <= NAMED:
            names = [name.replace("$", r"\$") for name in self.classes]
            axis.set_xticks(range(size), names, rotation=90, fontsize=8)
            axis.set_yticks(range(size), names, fontsize=8)
        if size <= NUMBERED:
            for (row, column), count in np.ndenumerate(self.counts):
                if count:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        axis.set_title(title, fontsize=10)
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
        pyplot.close(figure)
