"""Some groups of queries at a time, so that memory does not grow with the number of groups.

No group sees another, and the loss is a sum over groups. So the decoder and the loss of a few groups can run forward
and backward before the next groups begin: each pass adds to the gradient of the encoder's output, which goes back
through encoder and backbone once, at the end. The gradients are those of all groups at once; dropout draws other
numbers.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..groups import QueryGroups
from ..targets import PackedTargets, StepTotals
from .step_losses import Losses

__all__ = ["DecodesGroups", "GroupPasses", "average_gradients"]


@runtime_checkable
class DecodesGroups(Protocol):
    """A model whose encoder knows nothing of groups, and whose decoder can run with some of them.

    Where it has ``check_batch(images, masks, targets)``, that is called before the encoder, and raises for a batch that
    does not fit, as the model's ``forward`` does.

    Attributes:
        config: has ``num_groups`` and ``num_queries``, those of each group. It may have ``denoising_scope``, which is
            "first" where denoising queries are for group 0 alone.
    """

    config: Any

    def encode(self, images: Tensor, masks: Tensor | None) -> Any:
        """Images and their padding -> any nesting of tensors, the memory."""

    def decode(self, memory: Any, groups: QueryGroups, first: int, targets: PackedTargets | None) -> Any:
        """The predictions with the groups ``first``, ``first + 1``, ...; ``targets`` are for denoising queries."""


class GroupPasses:
    """Forward and backward pass of a model, ``groups_per_pass`` of its groups at a time.

    Denoising queries for group 0 alone are made in the pass of that group; those of every group in its own pass.

    Args:
        model: must be one of :class:`DecodesGroups`.
        criterion: called as ``criterion(output, targets, totals)``.
        groups_per_pass: at least 1.

    Raises:
        ValueError: if the model cannot decode some of its groups, or targets are not assigned to each group by itself.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., dict[str, Tensor]], groups_per_pass: int):
        if not isinstance(model, DecodesGroups):
            raise ValueError(
                f"{type(model).__name__} cannot run groups_per_pass={groups_per_pass} of its groups at a time: "
                "it has no encode and decode"
            )
        matcher = getattr(criterion, "matcher", None)
        num_groups = model.config.num_groups
        if getattr(matcher, "assignment", "group") != "group" or getattr(matcher, "positives", None) not in (
            None,
            num_groups,
        ):
            raise ValueError(
                f"groups_per_pass={groups_per_pass} needs targets that are assigned to each of the {num_groups} groups "
                "of queries by itself"
            )
        self.model = model
        self.criterion = criterion
        self.groups_per_pass = groups_per_pass

    def __call__(
        self,
        images: Tensor,
        masks: Tensor | None,
        targets: PackedTargets,
        totals: StepTotals,
        *,
        backward: Callable[[Tensor], None] = Tensor.backward,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch to those of the parameters.

        Args:
            images, masks, targets: as the model takes them.
            totals: of the step that the batch belongs to.
            backward: what starts from a loss; may scale it.
            autocast: context in which the model runs.

        Returns:
            The detached losses of all groups, as the criterion returns them for all groups at once.

        Raises:
            ValueError, TypeError: as the model, for a batch that does not fit.
        """
        check_batch: Any = getattr(self.model, "check_batch", None)
        if check_batch is not None:
            check_batch(images, masks, targets)
        config = self.model.config
        totals = replace(totals, num_groups=config.num_groups)
        with autocast():
            memory = self.model.encode(images, masks)
        parts, structure = pytree.tree_flatten(memory)
        leaves = [part.detach().requires_grad_() if _has_gradient(part) else part for part in parts]
        memory = pytree.tree_unflatten(leaves, structure)  # where gradients stop, until those of all passes are added
        losses = Losses()
        for first in range(0, config.num_groups, self.groups_per_pass):
            groups = QueryGroups(min(self.groups_per_pass, config.num_groups - first), config.num_queries)
            own = targets if first == 0 or getattr(config, "denoising_scope", "every") == "every" else None
            with autocast():
                output = self.model.decode(memory, groups, first, own)
            of_pass = self.criterion(output, targets, totals)
            backward(of_pass["loss"])
            losses = losses + Losses.of(of_pass)
            del output, of_pass  # before the next pass makes its own
        reached = [
            (part, leaf.grad)
            for part, leaf in zip(parts, leaves, strict=True)
            if _has_gradient(part) and leaf.grad is not None
        ]
        if reached:
            tensors, gradients = zip(*reached, strict=True)
            torch.autograd.backward(tensors, gradients)
        return losses.by_name()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, which DistributedDataParallel does only for what goes through its ``forward``.

    A parameter without a gradient in this process counts as 0: another process may have one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = []
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, average in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))


def _has_gradient(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad
