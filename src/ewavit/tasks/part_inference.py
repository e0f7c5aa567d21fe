"""`PartInference`: the parts of clouds without labels, as rows, as files of labelled points, as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ewavit.data.input_files import InputFiles
from ewavit.files import csv_text
from ewavit.points.cloud_files import CloudFiles
from ewavit.points.metrics import categories_of, category_of, predicted_parts
from ewavit.points.ops import knn
from ewavit.tasks.inference import Inference, InferenceOptions, Value
from ewavit.tasks.sheet import MOST_DRAWN, draw_sheet, short


class PartInference(Inference):
    """A part for each point of clouds: shares of the parts as rows, and a CSV file of each cloud's points."""

    has_sheet = True
    has_files = True
    files: CloudFiles

    def __init__(self, files: InputFiles, options: InferenceOptions) -> None:
        super().__init__(files, options)
        self.categories = categories_of(options.classes)
        self._rows: list[tuple[int, str, list[float]]] = []  # number, category, share of each part
        self._drawn: list[tuple[int, Any]] = []

    def update(self, numbers: Sequence[int], inputs: Tensor, outputs: Tensor) -> None:
        category = category_of(inputs)
        found = predicted_parts(outputs, category, list(self.categories.values()))
        names = list(self.categories)
        for number, cloud, of_cloud, parts in zip(numbers, inputs[..., :3], category, found, strict=True):
            shares = torch.bincount(parts, minlength=len(self.options.classes)) / len(parts)
            self._rows.append((number, names[int(of_cloud)], shares.tolist()))
            if self.options.sheet and len(self._drawn) < MOST_DRAWN:
                labelled = torch.cat([cloud, parts.unsqueeze(1)], 1)
                self._drawn.append((number, labelled.cpu().numpy()))
            if self.options.folder is not None:
                self._write_points(number, cloud, parts, self.options.folder)

    def _write_points(self, number: int, cloud: Tensor, parts: Tensor, folder: Path) -> None:
        """Give each point of a file the part of the nearest one that the model saw."""
        points, scaled = self.files.whole(number)
        nearest = knn(torch.from_numpy(scaled)[None], cloud.cpu()[None], 1)[1][0, :, 0]
        names = np.array([csv_text(name) for name in self.options.classes])[parts.cpu()[nearest]]
        with (folder / f"{self.stem(number)}.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(("x", "y", "z", "part"))
            writer.writerows((*point, name) for point, name in zip(points.tolist(), names, strict=True))

    def rows(self) -> list[dict[str, Value]]:
        rows: list[dict[str, Value]] = []
        for number, category, shares in self._rows:
            present = sorted((part for part, share in enumerate(shares) if share), key=lambda p: -shares[p])
            names: list[str] = [self.options.classes[part] for part in present]
            found = [shares[part] for part in present]
            name = self.files.names[number]
            rows.append({"input": name, "category": category, "parts": names, "shares": found})
        return rows

    def line(self, row: dict[str, Value]) -> str:
        *_, names, shares = row.values()
        assert isinstance(names, list)
        assert isinstance(shares, list)
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(names, shares, strict=True))

    def draw(self, path: Path) -> int:
        captions = [short(Path(self.files.names[number]).name) for number, _ in self._drawn]
        draw_sheet([cloud for _, cloud in self._drawn], captions, path, clouds=True)
        return len(captions)
