"""Weights that are sharded over processes (FSDP), as whole tensors and back, for checkpoints that serve any number."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

__all__ = ["check_sharding", "gathered", "own_part", "sharded_like", "sharded_optimizer_state", "whole"]


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse what checkpoints cannot be made of, and let FSDP compute in the precision of all other trainings.

    Raises:
        ValueError: for DeepSpeed, Megatron-LM and the first version of FSDP.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(f"weights are sharded by FSDP version 2 alone, not by {kind.value}: set fsdp_version to 2")
    if accelerator.is_fsdp2:
        # FSDP would cast the weights and, with them, reference points and boxes; autocast leaves those in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tree: Any, *, keep: bool) -> Any:
    """The same nesting with whole tensors, on the CPU, in place of shards; nothing else is changed.

    Every process must call this at the same time. What is gathered lies on the device one tensor at a time.

    Args:
        tree: any nesting of containers and tensors.
        keep: whether this process needs the result; the others get None for every sharded tensor.
    """

    def from_shards(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensor = whole(leaf)
        return tensor.cpu() if keep else None

    return pytree.tree_map(from_shards, tree)


def sharded_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, which every process has, sharded as those of the same names in ``like`` are."""
    return {name: _shard(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def sharded_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of an optimiser with its whole tensors sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        index: {
            # What is no tensor, or the number of steps, is the same in every process.
            name: _shard(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in of_parameter.items()
        }
        for index, of_parameter in state["state"].items()
    }
    return {**state, "state": sharded}


def _shard(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # Without a source, nothing is sent: each process takes its part of its own copy.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
