"""What every detector has: settings, an encoder of images, a decoder of groups of queries, and the one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..groups import QueryGroups, rows_near_first_group
from ..targets import PackedTargets, check_packed
from .config import BaseConfig
from .output import DetectorOutput, SegmentationOutput

__all__ = ["QUERY_PARAMETERS", "Detector", "check_batch", "group_rows", "in_eval_mode"]

# Starts of names of learned queries.
QUERY_PARAMETERS = ("query_embed.", "query_feat.", "refpoint_embed.", "tgt_embed.")


class Detector(nn.Module):
    """Images -> :meth:`encode` -> memory -> :meth:`decode`, with some of the groups of queries -> predictions.

    Memory does not depend on groups, and no group depends on another, so that a memory can be decoded some groups at a
    time. A detector also has ``decoder.layers``, the layers that training may compute again to save memory.

    Attributes:
        config: every setting.
        group_parameters: names of the parameters of which each group has its own rows, group-major. All others serve
            every group.
    """

    config: BaseConfig
    group_parameters: ClassVar[tuple[str, ...]]

    def __init__(self, config: BaseConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        targets: PackedTargets | None = None,
        *,
        num_groups: int | None = None,
        inference_group: int = 0,
    ) -> DetectorOutput | SegmentationOutput:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``, normalised as the backbone expects.
            masks: ``[B, H, W]`` bool, True on padding; None if no image is padded.
            targets: what denoising queries are made from, in training mode and where ``num_groups`` is given. Detectors
                without denoising queries accept them, since every detector is called alike, and do not use them.
            num_groups: groups to use, the first ones; default all in training mode and one in evaluation mode.
            inference_group: the group to use where one is used.

        Returns:
            The predictions of every decoder layer.

        Raises:
            ValueError: if a number of groups is out of range, a shape does not fit, or denoising queries would be of
                unknown classes.
            TypeError: if ``targets`` are not packed, images are not floating point, or masks not bool.
        """
        groups, first = self._choose_groups(num_groups, inference_group)
        if not self.training and num_groups is None:
            targets = None
        self.check_batch(images, masks, targets)
        return self.decode(self.encode(images, masks), groups, first, targets)

    def check_batch(self, images: Tensor, masks: Tensor | None, targets: PackedTargets | None) -> None:
        """Check what :meth:`forward` is called with, for those who call :meth:`encode` and :meth:`decode` themselves.

        Args:
            images, masks, targets: as in :meth:`forward`.

        Raises:
            ValueError, TypeError: as :meth:`forward`, for a batch that does not fit.
        """
        check_batch(images, masks, targets)

    def encode(self, images: Tensor, masks: Tensor | None) -> Any:
        """The part before the groups of queries.

        Args:
            images, masks: as in :meth:`forward`.

        Returns:
            What :meth:`decode` sees of the images: any nesting of tensors.
        """
        raise NotImplementedError

    def decode(
        self, memory: Any, groups: QueryGroups, first: int = 0, targets: PackedTargets | None = None
    ) -> DetectorOutput | SegmentationOutput:
        """Detect with some of the groups, in images that were encoded.

        Args:
            memory: from :meth:`encode`.
            groups: how the queries fall into groups.
            first: the first of these groups among those of the detector.
            targets: what denoising queries are made from, by detectors that have them; None for none.
        """
        raise NotImplementedError

    def query_positions(self) -> Tensor | None:
        """Where the queries of all groups start to look: the centres of learned reference points or anchors.

        Returns:
            ``[K * N, 2]`` float32, x and y relative to the image, group-major; None for a detector whose queries have
            no positions of their own.
        """
        return None

    def is_query(self, name: str) -> bool:
        """Whether the parameter with this name holds learned queries."""
        return name in self.group_parameters and name.startswith(QUERY_PARAMETERS)

    @torch.no_grad()
    def start_groups_near_first(self, noise: float, *, trained: int = 1) -> None:
        """Let new groups begin as copies of group 0 with noise, in place of values that know nothing of it.

        Everything that a group has of its own is copied. Without noise the groups would get the same gradients, except
        for what is random in a model and its losses, and would stay copies.

        Args:
            noise: standard deviation of the noise on a parameter's values, relative to that of group 0's.
            trained: groups, the first ones, that stay as they are.

        Raises:
            ValueError: if the noise is negative.
        """
        for name in self.group_parameters:
            parameter = self.get_parameter(name)
            parameter.copy_(rows_near_first_group(parameter, self.config.num_groups, noise, trained))

    def _choose_groups(self, num_groups: int | None, inference_group: int) -> tuple[QueryGroups, int]:
        """The layout of a forward pass and the first group that it uses."""
        total = self.config.num_groups
        if num_groups is None:
            num_groups = total if self.training else 1
        if not 1 <= num_groups <= total:
            raise ValueError(f"num_groups must be in [1, {total}], the groups this model has; got {num_groups}")
        if not 0 <= inference_group < total:
            raise ValueError(f"inference_group must be in [0, {total}), got {inference_group}")
        return QueryGroups(num_groups, self.config.num_queries), inference_group if num_groups == 1 else 0


def check_batch(images: Tensor, masks: Tensor | None, targets: PackedTargets | None) -> None:
    """Check what a detector is called with: masks of another size or meaning would hide other pixels in silence.

    Args:
        images, masks, targets: as in :meth:`Detector.forward`.

    Raises:
        ValueError: for a shape that does not fit.
        TypeError: if ``targets`` are not packed, images are not floating point, or masks not bool.
    """
    if targets is not None:
        check_packed(targets)
    if torch.compiler.is_compiling():  # sizes are symbols there, of which comparisons would make new constraints
        return
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
    if not images.dtype.is_floating_point:
        raise TypeError(f"images must be floating point, normalised as the backbone expects, got {images.dtype}")
    batch, _, height, width = images.shape
    if masks is not None and masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, True on padding, got {masks.dtype}")
    if masks is not None and masks.shape != (batch, height, width):
        raise ValueError(f"masks must have shape {[batch, height, width]}, as images have, got {list(masks.shape)}")
    if targets is not None and targets.batch_size != batch:
        raise ValueError(f"images are {batch}, but targets are of {targets.batch_size}")


def group_rows(weight: Tensor, groups: QueryGroups, first: int) -> Tensor:
    """Rows of a group-major embedding ``[K_total * N, d]`` that belong to the chosen groups, ``[1, K * N, d]``."""
    start = first * groups.queries_per_group
    return weight[None, start : start + groups.matching_length]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
