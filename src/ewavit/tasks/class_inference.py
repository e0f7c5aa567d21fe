"""`ClassInference`: the most probable classes of inputs without labels, as rows and as a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ewavit.data.input_files import InputFiles
from ewavit.tasks.inference import Inference, InferenceOptions, Value, shown
from ewavit.tasks.sheet import MOST_DRAWN, draw_sheet, short


class ClassInference(Inference):
    """The most probable classes of each input."""

    has_sheet = True

    def __init__(self, files: InputFiles, options: InferenceOptions) -> None:
        super().__init__(files, options)
        self.topk = min(options.topk, len(options.classes))
        self._found: list[tuple[int, list[int], list[float]]] = []  # number, classes, probabilities

    def update(self, numbers: Sequence[int], inputs: Tensor, outputs: Tensor) -> None:
        logits = outputs.topk(self.topk, 1)
        probabilities = outputs.softmax(1).gather(1, logits.indices)
        self._found += zip(numbers, logits.indices.tolist(), probabilities.tolist(), strict=True)

    def rows(self) -> list[dict[str, Value]]:
        top, names = f"top{self.options.topk}", self.options.classes
        return [
            {
                "input": self.files.names[number],
                "prediction": classes[0],
                "predicted_class": names[classes[0]],
                "probability": probabilities[0],
                top: [names[label] for label in classes],
                f"{top}_probabilities": probabilities,
            }
            for number, classes, probabilities in self._found
        ]

    def line(self, row: dict[str, Value]) -> str:
        *_, classes, probabilities = row.values()
        assert isinstance(classes, list)
        assert isinstance(probabilities, list)
        return "; ".join(
            f"{100 * probability:.1f} % {shown(name)}"
            for name, probability in zip(classes, probabilities, strict=True)
        )

    def draw(self, path: Path) -> int:
        chosen = self._found[:MOST_DRAWN]
        pictures = [self.files.show(number) for number, *_ in chosen]
        captions = [
            f"{short(Path(self.files.names[number]).name)}\n"
            f"{100 * probabilities[0]:.1f} % {short(self.options.classes[classes[0]])}"
            for number, classes, probabilities in chosen
        ]
        draw_sheet(pictures, captions, path, clouds=self.files.kind == "clouds")
        return len(chosen)
