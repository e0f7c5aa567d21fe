"""A model as a graph: the `.pt2` of torch.export, or ONNX, for batches of any size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

AXES = {0: "batch", 2: "height", 3: "width"}  # of images; clouds are dynamic in the batch alone


def write_graph(
    model: nn.Module, inputs: Tensor, metadata: dict[str, str], file: Path, resizable: bool
) -> None:
    """Write a model as a graph, by the ending of the file.

    Args:
        model: the plain model, in eval mode.
        inputs: two or more inputs.
        metadata: text by name, kept in the file.
        file: ends in .pt2 or .onnx.
        resizable: images may also have other heights and widths.

    Raises:
        EwavitError: torch cannot export the model.
    """
    axes = AXES if resizable else {0: AXES[0]}
    dynamic = ({0: torch.export.Dim("batch")} | dict.fromkeys(list(axes)[1:], torch.export.Dim.AUTO),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            program = torch.export.export(model, (inputs,), dynamic_shapes=dynamic)
        except Exception as problem:  # torch.export's errors have no common class
            raise EwavitError(
                f"torch cannot export the model as a graph ({first_line(problem)}): choose a name ending in "
                ".safetensors"
            ) from None
        for part in program.graph_module.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it has paths of this machine
        if file.suffix == ".pt2":
            torch.export.save(program, file, extra_files=metadata)
        else:
            _write_onnx(program, axes, metadata, file)


def _write_onnx(program: Any, axes: dict[int, str], metadata: dict[str, str], file: Path) -> None:
    import onnx

    made = torch.onnx.export(
        program, (), dynamo=True, dynamic_shapes=(axes,), input_names=["images"], output_names=["logits"],
        verbose=False,
    )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, file)


def read_onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What computes an ONNX file's logits, and its metadata.

    Raises:
        EwavitError: the file cannot be read. The function raises it for inputs that do not fit.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(regular(file)), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as problem:  # onnxruntime's errors have no common class
        raise EwavitError(f"{file} cannot be read as an ONNX file ({first_line(problem)})") from None

    def predict(images: Tensor) -> Tensor:
        try:
            outputs = session.run(None, {name: images.cpu().numpy()})[0]
        except Exception as problem:
            raise EwavitError(
                f"{file} does not compute on {tuple(images.shape)} inputs ({first_line(problem)}): "
                "export it again"
            ) from None
        return torch.from_numpy(outputs)

    return predict, dict(metadata)
