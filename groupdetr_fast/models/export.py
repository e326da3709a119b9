"""Inference graphs of detectors, as torch.export programs and as ONNX files.

A graph takes images alone and uses one group of queries. The number of images is free, their size is fixed.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops.ms_deform_attn.reference import ms_deform_attn_reference

__all__ = ["export_onnx", "export_program"]


class _Inference(nn.Module):
    """What runs at inference: one group, and of its predictions those of the last layer."""

    def __init__(self, model: nn.Module, group: int):
        super().__init__()
        self.model = model
        self.group = group

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(images, num_groups=1, inference_group=self.group)
        return out.logits[-1], out.boxes[-1]


@torch.no_grad()
def export_program(
    model: nn.Module, image_size: tuple[int, int], *, inference_group: int = 0
) -> torch.export.ExportedProgram:
    """Trace the inference graph of a detector.

    Args:
        model: a detector of this package that predicts boxes; its modules keep their modes.
        image_size: (height, width) of the images in pixels, without padding.
        inference_group: the group of queries to use.

    Returns:
        A program that takes images ``[B, 3, height, width]``, normalised as the backbone expects and on the model's
        device, for any B, and returns logits ``[B, N, C]`` and boxes ``[B, N, 4]``, as in the last layer of a
        :class:`DetectorOutput`. This package's ops stay in it as they are.

    Raises:
        TypeError: if the model predicts no boxes.
        ValueError: if the model does not have that group.
    """
    if model.config.predicts_masks:
        raise TypeError(f"expected a detector of boxes, got {type(model).__name__}")
    height, width = image_size
    parameter = next(model.parameters())
    images = torch.zeros(2, 3, height, width, dtype=parameter.dtype, device=parameter.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.export.export(
            _Inference(model, inference_group), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
    finally:
        for module, training in modes:
            module.training = training


def export_onnx(model: nn.Module, path: str | Path, image_size: tuple[int, int], *, inference_group: int = 0) -> None:
    """Write the inference graph of a detector as an ONNX file of standard operators.

    Needs onnx and onnxscript (the extra ``export``).

    Args:
        model: as in :func:`export_program`.
        path: where to write. The input is called ``images``, the outputs ``logits`` and ``boxes``, with the shapes
            that :func:`export_program` gives; their first dimension is free.
        image_size: (height, width) of the images in pixels.
        inference_group: the group of queries to use.

    Raises:
        ImportError: if onnx or onnxscript is missing.
        TypeError, ValueError: as :func:`export_program`.
    """
    program = export_program(model, image_size, inference_group=inference_group)
    own = torch.ops.groupdetr_fast
    program = program.run_decompositions(
        {own.grouped_attention.default: _attend_in_one_group, own.ms_deform_attn.default: ms_deform_attn_reference}
    )
    exported = torch.onnx.export(program, input_names=["images"], output_names=["logits", "boxes"], verbose=False)
    exported.save(path)


def _attend_in_one_group(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``grouped_attention`` where all queries are one group and nothing is dropped."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scale
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)
