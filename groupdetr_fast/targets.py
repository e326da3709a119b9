"""The ground truth of a batch, packed into tensors whose shapes depend on host-side numbers alone, and of a step."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PackedTargets", "StepTotals", "check_packed", "tensor_on"]

_SLACK = 0.01  # of the image's size, by which rounded boxes may leave the image
_FAR = 0.1  # of the image's size: boxes that leave it so far are not clipped, or are no centres and sizes


@dataclass(frozen=True)
class PackedTargets:
    """Targets of ``B`` images, padded to the largest number of objects ``T_max`` (0 is allowed).

    The numbers of objects are known on the host (``sizes``) and on the device (``num_targets``), so that nothing that
    uses them needs a device synchronisation. Padding rows come last in each image and are all zeros.

    Attributes:
        labels: ``[B, T_max]`` int64, class indices.
        boxes: ``[B, T_max, 4]`` floating point, ``cxcywh`` normalised to [0, 1] by the image size.
        num_targets: ``[B]`` int64, objects per image.
        sizes: the same numbers as Python integers.
        masks: one ``[T_b, H_b, W_b]`` bool tensor per image for segmentation, at the image's size without its padding;
            None without. They are not padded to ``T_max``: the largest tensors here take the room they need.
        largest_label: largest entry of ``labels`` on the host, to compare with a number of classes; None where nobody
            has looked, since that would wait for a GPU.
    """

    labels: Tensor
    boxes: Tensor
    num_targets: Tensor
    sizes: tuple[int, ...]
    masks: tuple[Tensor, ...] | None = None
    largest_label: int | None = None

    @classmethod
    def from_list(cls, targets: Sequence[Mapping[str, Tensor]]) -> "PackedTargets":
        """Pack one ``{"labels": [T_b] int64, "boxes": [T_b, 4][, "masks": [T_b, H, W]]}`` per image.

        All tensors must lie on one device; keys other than these three are ignored. Values are checked of tensors on
        the CPU alone: looking at others would wait for their device. Boxes that could all be (x1, y1, x2, y2), and
        some of which would lie far outside of the image otherwise, give a warning.

        Raises:
            ValueError: if the list is empty, a key is missing or a shape or device does not fit, and on the CPU for a
                negative label, or a box that is not finite, not in [0, 1] or of negative size; the message names the
                image by its index, and the row.
            TypeError: if ``labels`` are not integers, ``boxes`` not floating point or ``masks`` not bool, if one of
                these is no tensor, or ``targets`` are one dictionary.
        """
        if isinstance(targets, Mapping):
            raise TypeError("targets must be a list with one dictionary for each image, got a dictionary")
        if len(targets) == 0:
            raise ValueError("targets must hold at least one image")
        for index, target in enumerate(targets):
            _check(index, target, targets[0])
        sizes = tuple(len(target["labels"]) for target in targets)
        first = targets[0]["boxes"]
        labels = torch.zeros(len(sizes), max(sizes), dtype=torch.int64, device=first.device)
        boxes = torch.zeros(len(sizes), max(sizes), 4, dtype=first.dtype, device=first.device)
        for index, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            labels[index, :size] = target["labels"]
            boxes[index, :size] = target["boxes"]
        largest = None
        if first.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            _check_values(labels, boxes)
            _warn_of_corners(boxes, sizes)
            largest = int(labels.max())
        masks = tuple(target["masks"] for target in targets) if "masks" in targets[0] else None
        return cls(labels, boxes, tensor_on(sizes, first.device), sizes, masks, largest)

    @property
    def batch_size(self) -> int:
        return len(self.sizes)

    @property
    def max_targets(self) -> int:
        """``T_max``, the second size of ``labels`` and ``boxes``."""
        return self.labels.shape[1]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def valid(self) -> Tensor:
        """``[B, T_max]`` bool, False on padding."""
        return torch.arange(self.max_targets, device=self.device) < self.num_targets[:, None]

    def check_labels(self, num_classes: int) -> None:
        """Check that the labels are those of a model's classes, where the largest of them is known on the host.

        Raises:
            ValueError: if one is not; the message names the image by its index, and the row.
        """
        # A compiled step would be compiled again for other labels.
        if torch.compiler.is_compiling() or self.largest_label is None or self.largest_label < num_classes:
            return
        image, row = (self.labels >= num_classes).nonzero()[0].tolist()
        label = int(self.labels[image, row])
        raise ValueError(
            f"targets[{image}], row {row}: the label {label} is not in 0 ... {num_classes - 1}, the model's classes"
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTargets":
        """The same targets on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedTargets":
        """The same targets in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PackedTargets":
        return replace(
            self,
            labels=function(self.labels),
            boxes=function(self.boxes),
            num_targets=function(self.num_targets),
            masks=None if self.masks is None else tuple(map(function, self.masks)),
        )


def tensor_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A tensor of the numbers. Towards a GPU it is pinned, since the host would wait for a copy from other memory."""
    pinned = device.type == "cuda" and torch.cuda.is_available()  # fake tensors lie on GPUs that there are not
    # The memory of the pinned tensor, which is gone on return, is not given out again before the copy is done.
    return torch.tensor(numbers, pin_memory=pinned).to(device, non_blocking=pinned)


@dataclass(frozen=True)
class StepTotals:
    """What the losses of one optimiser step are divided by, where the step takes several calls of the criterion.

    The calls are for the batches of an accumulated step, or for some groups of queries at a time. Their losses add up
    to those of one call for everything.

    Attributes:
        num_objects: scalar, objects of all images of the step, averaged over processes and at least 1.
        sizes: objects of each image of the step, in this process.
        num_groups: K, groups of the step; None: those of the predictions.
    """

    num_objects: Tensor
    sizes: tuple[int, ...]
    num_groups: int | None = None

    @classmethod
    def of(cls, batches: Sequence[PackedTargets]) -> "StepTotals":
        """The totals of a step on some batches; every process must call this at the same time."""
        for targets in batches:
            check_packed(targets)
        numbers = [targets.num_targets for targets in batches]
        count = (numbers[0] if len(numbers) == 1 else torch.cat(numbers)).sum(dtype=torch.float32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return cls(count.clamp(min=1), tuple(size for targets in batches for size in targets.sizes))


def check_packed(targets: object) -> None:
    """Check that ``targets`` are packed.

    Raises:
        TypeError: if they are not, as the list of dictionaries that DETR's code bases take.
    """
    if not isinstance(targets, PackedTargets):
        raise TypeError(f"targets must be packed by PackedTargets.from_list(targets), got a {type(targets).__name__}")


def _check_values(labels: Tensor, boxes: Tensor) -> None:
    """Check packed ``labels [B, T]`` and ``boxes [B, T, 4]``, which lie on the CPU; padding is zeros."""
    if labels.min() < 0:
        image, row = (labels < 0).nonzero()[0].tolist()
        raise ValueError(f"targets[{image}], row {row}: labels must not be negative, got {int(labels[image, row])}")
    # written so that they also refuse what is not a number
    inside = bool(boxes.amin() >= -_SLACK) and bool(boxes.amax() <= 1 + _SLACK)
    if not (inside and bool(boxes[..., 2:].amin() >= 0)):
        fits = ((boxes >= -_SLACK) & (boxes <= 1 + _SLACK)).all(-1) & (boxes[..., 2:] >= 0).all(-1)
        image, row = (~fits).nonzero()[0].tolist()
        numbers = ", ".join(f"{value:.4g}" for value in boxes[image, row].tolist())
        raise ValueError(
            f"targets[{image}], row {row}: boxes must be (cx, cy, width, height) divided by the size of the image, all "
            f"in [0, 1], got ({numbers})"
        )


def _warn_of_corners(boxes: Tensor, sizes: Sequence[int]) -> None:
    """Warn if packed boxes ``[B, T, 4]`` in [0, 1] on the CPU look like corners: as such, each is in order."""
    centres, half = boxes[..., :2], boxes[..., 2:] / 2
    if bool((centres - half).amin() >= -_FAR) and bool((centres + half).amax() <= 1 + _FAR):
        return
    as_corners = (boxes[..., 2:] > boxes[..., :2]).all(-1).sum(1).tolist()  # padding is not
    if as_corners == list(sizes) and sum(sizes) > 1:
        warnings.warn(
            "all boxes of a batch look like (x1, y1, x2, y2), and some would reach far out of their image as "
            "(cx, cy, width, height), which is how boxes are read: convert them",
            stacklevel=3,
        )


def _check(index: int, target: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
    for key in ("labels", "boxes"):
        if key not in target:
            hint = ': give what is in "class_labels" under that name' if f"class_{key}" in target else ""
            raise ValueError(f'targets[{index}] lacks the key "{key}"{hint}')
    for key in ("labels", "boxes", "masks"):
        if key in target and not isinstance(target[key], Tensor):
            raise TypeError(f"targets[{index}]: {key} must be a tensor, got a {type(target[key]).__name__}")
    labels, boxes = target["labels"], target["boxes"]
    if labels.dim() != 1:
        raise ValueError(f"targets[{index}]: labels must have shape [T], got {list(labels.shape)}")
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"targets[{index}]: boxes must have shape [{len(labels)}, 4], got {list(boxes.shape)}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"targets[{index}]: labels must be integers, got {labels.dtype}")
    if not boxes.dtype.is_floating_point:
        raise TypeError(f"targets[{index}]: boxes must be floating point, got {boxes.dtype}")
    if boxes.device != first["boxes"].device or labels.device != boxes.device:
        raise ValueError(f"targets[{index}]: labels and boxes must lie on {first['boxes'].device}, as those of image 0")
    if ("masks" in target) != ("masks" in first):
        raise ValueError(f"targets[{index}]: either every image has masks or none")
    if "masks" in target:
        _check_masks(index, target["masks"], len(labels), boxes.device)


def _check_masks(index: int, masks: Tensor, size: int, device: torch.device) -> None:
    if masks.dim() != 3 or len(masks) != size:
        raise ValueError(f"targets[{index}]: masks must have shape [{size}, H, W], got {list(masks.shape)}")
    if masks.dtype != torch.bool:
        raise TypeError(f"targets[{index}]: masks must be bool, got {masks.dtype}")
    if masks.device != device:
        raise ValueError(f"targets[{index}]: masks must lie on {device}, as labels and boxes")
