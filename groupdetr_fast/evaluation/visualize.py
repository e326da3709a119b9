"""Pictures of predictions, also beside the ground truth.

Images are reduced to about the size at which they are shown before anything is drawn: matplotlib takes many times the
memory of an image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .fonts import in_one_font, written

__all__ = [
    "CELL_PIXELS",
    "PICTURE_PIXELS",
    "draw_detections",
    "draw_frame",
    "draw_image",
    "reduce_image",
    "scale_objects",
]

CELL_PIXELS = 600  # of the long side of an image that is shown together with others
PICTURE_PIXELS = 2000  # of the long side of a picture of one image, at most

_CELL = 2.6  # inches, the width of one picture
_NAME = 40  # characters of a category's name
_GAP = 0.05  # of that width, between images
_TALLEST = 3.0  # height of a cell in its widths
_LEAST_INCHES = 0.1  # of a side of a single picture
_TITLE = 0.3  # inches, the line above the first row
_PAIRS_PER_ROW = 3  # images with their ground truth; without it, twice as many
_MASK_ALPHA = 0.45
_LONG_SIDE = 8.0  # inches of a single picture, so that text keeps its size relative to the image
_LEAST_PIXELS = 640  # of that side, so that text can be read


def draw_detections(
    images: Sequence[Tensor],
    ground_truth: Sequence[Mapping[str, Tensor]] | None,
    predictions: Sequence[Mapping[str, Tensor]],
    category_names: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
) -> None:
    """Write a picture that shows each image twice: with its ground truth, and with its predictions and their scores.

    Without ground truth each image is shown once. Boxes have one colour for each category, masks one for each object.
    matplotlib's global backend and figures are not touched.

    Args:
        images: uint8 ``[3, H, W]``, RGB, one or more, of any sizes.
        ground_truth: None, or per image ``{"labels": [T], "boxes": [T, 4]}``, ``xyxy`` in pixels of that image, as
            ``CocoDataset.ground_truth`` gives them; also with ``"masks": [T, H, W]``, which are then drawn instead.
        predictions: per image ``{"scores": [N], "labels": [N], "boxes": [N, 4]}``, as ``postprocess`` gives them; also
            with ``"masks": [N, H, W]``.
        category_names: the name of each label; other labels are shown by their number. A single category is not named
            beside masks.
        path: the file to write; its ending (png, pdf, svg) is the format.
        score_threshold: predictions with a lower score are not drawn.

    Raises:
        ValueError: if there are no images or the lists differ in length.
    """
    truths = [None] * len(predictions) if ground_truth is None else ground_truth
    if not images or not len(images) == len(truths) == len(predictions):
        raise ValueError(
            "need as many images as ground truths and predictions, at least one; "
            f"got {len(images)}, {len(truths)} and {len(predictions)}"
        )
    shown = 1 if ground_truth is None else 2  # how often each image is
    per_row = min(_PAIRS_PER_ROW * 2 // shown, len(images))
    rows = -(-len(images) // per_row)
    aspect = sum(min(image.shape[1] / image.shape[2], _TALLEST) for image in images) / len(images)
    widths = [*[1] * shown, _GAP] * per_row
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(sum(widths) * _CELL, rows * _CELL * (aspect + _GAP) + _TITLE), layout=layout)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        column = (shown + 1) * (index % per_row)
        *left, right = axes[index // per_row, column : column + shown]
        if truth is not None:
            _draw(left[0], image, truth, category_names, CELL_PIXELS)
        _draw(right, image, _above(prediction, score_threshold), category_names, CELL_PIXELS)
        if index < per_row:
            if truth is not None:
                left[0].set_title("ground truth", fontsize=9)
            right.set_title(f"predictions (score ≥ {score_threshold:g})", fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path, dpi=110)


def draw_image(
    image: Tensor,
    prediction: Mapping[str, Tensor],
    category_names: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
) -> None:
    """Write one image with its predictions, at its own size, but with a long side of 640 to 2000 pixels.

    Args:
        image: uint8 ``[3, H, W]``, RGB.
        prediction: an entry of the ``predictions`` of :func:`draw_detections`.
        category_names: the name of each label; other labels are shown by their number.
        path: the file to write; its ending (jpg, png, pdf, svg) is the format.
        score_threshold: predictions with a lower score are not drawn.
    """
    height, width = image.shape[1:]
    long_side = max(height, width)
    shown = min(max(long_side, _LEAST_PIXELS), PICTURE_PIXELS)
    sides = [max(_LONG_SIDE * side / long_side, _LEAST_INCHES) for side in (width, height)]
    figure = Figure(figsize=(sides[0], sides[1]))
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    _draw(axis, image, _above(prediction, score_threshold), category_names, PICTURE_PIXELS)
    axis.set_aspect("auto")  # the figure has the image's shape but for rounding, which would leave a margin
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path, dpi=shown / _LONG_SIDE)


def draw_frame(image: Tensor, prediction: Mapping[str, Tensor], category_names: Sequence[str]) -> Tensor:
    """One frame of a video with its predictions, at its own size: faster and plainer than :func:`draw_image`.

    Args:
        image: uint8 ``[3, H, W]``, RGB.
        prediction: an entry of the ``predictions`` of :func:`draw_detections`; all its detections are drawn.
        category_names: the name of each label; other labels are shown by their number.

    Returns:
        uint8 ``[3, H, W]``.
    """
    # Best last, so that it lies on top; and what has a width and a height.
    sides = prediction["boxes"][:, 2:] - prediction["boxes"][:, :2]
    order = [index for index in prediction["scores"].argsort().tolist() if sides[index].min() > 0]
    if not order:
        return image
    labels, masks = [prediction["labels"].tolist()[index] for index in order], prediction.get("masks")
    palette = _palette(category_names, masks is not None)
    keys = labels if masks is None else order
    colours = [tuple(round(255 * part) for part in palette(key % palette.N)[:3]) for key in keys]
    if masks is not None:
        image = draw_segmentation_masks(image, masks[order], alpha=_MASK_ALPHA, colors=colours)
    long_side = max(image.shape[1:])
    scores = prediction["scores"][order].tolist()
    names, font = in_one_font([_name(label, category_names) for label in labels])
    return draw_bounding_boxes(
        image,
        prediction["boxes"][order],
        [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)],
        colors=colours,
        width=max(1, round(long_side / 320)),
        font=font,
        font_size=max(10, round(long_side / 50)),
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
    )


def reduce_image(image: Tensor, long_side: int) -> Tensor:
    """An image ``[3, H, W]`` with a long side of at most ``long_side`` pixels."""
    height, width = image.shape[1:]
    scale = min(1.0, long_side / max(height, width))
    return F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))]) if scale < 1 else image


def scale_objects(objects: Mapping[str, Tensor], size: tuple[int, int], new_size: tuple[int, int]) -> dict[str, Tensor]:
    """Objects in an image of ``size``, (height, width), as they lie in it at ``new_size``."""
    factors = torch.tensor([new_size[1] / size[1], new_size[0] / size[0]]).repeat(2)
    scaled = {**objects, "boxes": objects["boxes"].cpu() * factors}
    if "masks" in objects and new_size != size:
        masks = objects["masks"].to(torch.uint8)
        scaled["masks"] = F.resize(masks, list(new_size), interpolation=F.InterpolationMode.NEAREST)
    return scaled


def _above(prediction: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    kept = prediction["scores"] >= threshold
    return {name: value[kept] for name, value in prediction.items()}


def _draw(axis: Axes, full: Tensor, objects: Mapping[str, Tensor], names: Sequence[str], long_side: int) -> None:
    image = reduce_image(full, long_side)
    objects = scale_objects(objects, (full.shape[1], full.shape[2]), (image.shape[1], image.shape[2]))
    pixels = image.cpu().permute(1, 2, 0).numpy()
    labels, scores, masks = objects["labels"].tolist(), objects.get("scores"), objects.get("masks")
    # Best last, so that it lies on top.
    order = range(len(labels)) if scores is None else scores.argsort().tolist()
    palette = _palette(names, masks is not None)
    colours = [palette((label if masks is None else index) % palette.N) for index, label in enumerate(labels)]
    if masks is not None:
        pixels = _overlay(pixels, [masks[index].cpu().numpy() > 0 for index in order], [colours[i] for i in order])
    axis.imshow(pixels, interpolation="nearest")
    height, width = image.shape[1:]
    for index in order:
        corners = objects["boxes"][index].tolist()
        text = _name(labels[index], names)
        if scores is not None:
            text += f" {scores[index]:.2f}"
        if masks is None:
            _draw_box(axis, corners, colours[index])
        if masks is None or len(names) > 1:
            _write(axis, text, corners, colours[index], height, width)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def _palette(names: Sequence[str], by_object: bool) -> ListedColormap:
    return cast(ListedColormap, colormaps["tab10" if not by_object and len(names) <= 10 else "tab20"])


def _name(label: int, names: Sequence[str]) -> str:
    return names[label][:_NAME] if 0 <= label < len(names) else str(label)


def _overlay(pixels: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Colour masks ``[H, W]`` bool, with opaque edges, into pixels ``[H, W, 3]`` uint8."""
    painted = pixels.astype(np.float32)
    for mask, colour in zip(masks, colours, strict=True):
        inner = mask.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(mask, step, axis)
        alpha = np.where(mask & ~inner, 1.0, _MASK_ALPHA * mask)[..., None]
        painted = (1 - alpha) * painted + alpha * 255 * np.array(colour[:3], dtype=np.float32)
    return painted.round().astype(np.uint8)


def _draw_box(axis: Axes, corners: Sequence[float], colour: tuple[float, ...]) -> None:
    x1, y1, x2, y2 = corners
    outline = [patheffects.withStroke(linewidth=2.6, foreground="white")]
    axis.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.4, path_effects=outline)
    )


def _write(axis: Axes, text: str, corners: Sequence[float], colour: tuple[float, ...], height: int, width: int) -> None:
    """Write above the box, or inside where the image ends; to the left where it would run out on the right."""
    x1, y1, x2, _ = corners
    above, leftwards = y1 > 0.08 * height, x1 > 0.8 * width
    properties = written(text)
    axis.text(
        min(x2, width) if leftwards else max(x1, 0), max(y1, 0), properties.pop("text"), fontsize=6.5, color="white",
        clip_on=True, **properties,
        va="bottom" if above else "top", ha="right" if leftwards else "left",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip
