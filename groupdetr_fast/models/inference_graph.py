"""Inference graphs of detectors, as torch.export programs and as ONNX files.

A graph uses one group of queries. It takes any number of images of any size, with or without masks of their padding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..ops.cross_attention.decomposition import attend_by_products
from ..ops.grouped_attention.decomposition import attend_in_one_group
from ..ops.ms_deform_attn.decomposition import deform_by_grid_sample
from .detector import Detector, in_eval_mode

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["export_onnx", "export_program"]

# Free sizes are traced at one that leaves several cells, of different numbers, in the coarsest map of every detector.
TRACED_SIZE = (608, 800)


class _Inference(nn.Module):
    """What runs at inference: one group, and of its predictions those of the last layer."""

    def __init__(self, model: Detector, group: int):
        super().__init__()
        self.model = model
        self.group = group

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if masks is not None:
            torch._check(masks.shape == images[:, 0].shape)  # tells the tracer that their free axes are the same
        out = self.model(images, masks, num_groups=1, inference_group=self.group)
        return out.logits[-1], out.boxes[-1]


class _HalfInference(_Inference):
    """The same with matrix products and convolutions in float16, as a training with ``--precision fp16`` has them."""

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.float16), _NormsInFloat32():
            logits, boxes = super().forward(images, masks)
        return logits.float(), boxes.float()


class _NormsInFloat32(TorchFunctionMode):
    """Norms of tokens in float32: so autocast has them on GPUs, and on CPUs it leaves them as their inputs are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.layer_norm, F.group_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def export_program(
    model: Detector, image_size: tuple[int, int] | None = None, *, masks: bool = False, inference_group: int = 0
) -> torch.export.ExportedProgram:
    """Trace the inference graph of a detector.

    Args:
        model: a detector of this package that predicts boxes; its modules keep their modes.
        image_size: (height, width) of all images in pixels; None for a graph that takes any size from two cells of the
            coarsest feature map on (with ResNet-50, 33 pixels on one level and 65 on four).
        masks: whether the graph also takes masks of the images' padding; without, no image may be padded.
        inference_group: the group of queries to use.

    Returns:
        A program that takes ``images [B, 3, H, W]``, normalised as the backbone expects and on the model's device, and
        with ``masks`` also ``[B, H, W]`` bool, True on padding, for any B. It returns logits ``[B, N, C]`` and boxes
        ``[B, N, 4]``, as in the last layer of a :class:`DetectorOutput`. This package's ops stay in it as they are.

    Raises:
        TypeError: if the model predicts no boxes.
        ValueError: for a size below 1, if the model does not have that group, or its backbone needs an ``image_size``:
            networks that pad as TensorFlow does, such as timm's ``tf_efficientnet``, pad by amounts that follow from
            the size.
    """
    return _trace(model, image_size, masks, _Inference(model, inference_group))


def _trace(
    model: Detector, image_size: tuple[int, int] | None, masks: bool, graph: _Inference
) -> torch.export.ExportedProgram:
    if image_size is not None and min(image_size) < 1:
        raise ValueError(f"image_size must be a height and a width from 1 on, got {tuple(image_size)}")
    if model.config.predicts_masks:
        raise TypeError(f"expected a detector of boxes, got {type(model).__name__}")
    if image_size is None and any(type(module).__name__.endswith("Same") for module in model.modules()):
        # Tracing their paddings as formulas of the size takes longer than anybody waits.
        raise ValueError(f"backbone {model.config.backbone!r} pads by the size of the image: give image_size")
    height, width = image_size or TRACED_SIZE
    parameter = next(model.parameters())
    inputs = [torch.zeros(2, 3, height, width, dtype=parameter.dtype, device=parameter.device)]
    if masks:
        inputs.append(torch.zeros(2, height, width, dtype=torch.bool, device=parameter.device))
    last = (-2, -1) if image_size is None else ()
    free = [{axis % tensor.dim(): torch.export.Dim.DYNAMIC for axis in (0, *last)} for tensor in inputs]
    with in_eval_mode(model):
        return torch.export.export(graph, tuple(inputs), dynamic_shapes=tuple(free))


@torch.no_grad()
def export_onnx(
    model: Detector,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    *,
    masks: bool = False,
    inference_group: int = 0,
    half: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the inference graph of a detector as an ONNX file of standard operators.

    Needs onnx and onnxscript (the extra ``export``).

    Args:
        model, image_size, masks, inference_group: as in :func:`export_program`.
        path: where to write. The inputs are called ``images`` and ``masks``, the outputs ``logits`` and ``boxes``, with
            the shapes that :func:`export_program` gives; free axes are called ``batch``, ``height`` and ``width``.
        half: matrix products, convolutions and their weights in float16, with which the file has half the size. Norms
            of tokens, positions, boxes and where deformable attention samples stay in float32, as the inputs and
            outputs do: a file of the one kind replaces one of the other.
        metadata: what to write into the file's ``metadata_props``, such as the names of the classes.

    Raises:
        ImportError: if onnx or onnxscript is missing.
        TypeError, ValueError: as :func:`export_program`.
    """
    graph = (_HalfInference if half else _Inference)(model, inference_group)
    program = _trace(model, image_size, masks, graph)
    own = torch.ops.groupdetr_fast
    program = program.run_decompositions(
        {
            own.cross_attention.default: attend_by_products,
            own.grouped_attention.default: attend_in_one_group,
            own.ms_deform_attn.default: deform_by_grid_sample,
        }
    )
    inputs = ["images", "masks"] if masks else ["images"]
    names = {0: "batch", 2: "height", 3: "width"} if image_size is None else {0: "batch"}
    exported = torch.onnx.export(
        program,
        dynamic_shapes=(names, None)[: len(inputs)],  # those of the masks are the same
        input_names=inputs,
        output_names=["logits", "boxes"],
        optimize=not half,
        verbose=False,
    )
    assert exported is not None  # which it is for other exporters alone
    if half:
        _store_half(exported.model)
    exported.model.metadata_props.update(metadata or {})
    exported.save(path)


def _store_half(model: "onnx_ir.Model") -> None:
    """Optimise a graph, and store its weights in the types that they are used in."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir

    # By default, operators on large weights are left for the runtime, and the file has them in float32.
    optimize_ir(model, should_fold=lambda node: True if node.op_type in ("Cast", "Slice", "Transpose") else None)
    weights = {
        value for node in model.graph if node.op_type == "Conv" for value in node.inputs[1:] if value is not None
    }
    for value in weights:  # which are of float32 again where norms were multiplied into them
        if value.const_value is not None and value.dtype != onnx_ir.DataType.FLOAT16:
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float16"), name=value.name)
            value.dtype = onnx_ir.DataType.FLOAT16
