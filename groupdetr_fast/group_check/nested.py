"""The tensors in what a model takes and returns: mappings, sequences, dataclasses and plain objects of any nesting."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["find_tensors", "first_image", "replace_tensors"]


def find_tensors(value: Any) -> dict[str, Tensor]:
    """The tensors by their place, such as ``aux_outputs.0.pred_boxes``; one that stands in two places, in the first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    _collect(value, "", found, seen)
    return found


def _collect(value: Any, place: str, found: dict[str, Tensor], seen: set[int]) -> None:
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        found[place or "output"] = value
        return
    children = _children(value)
    if children:
        seen.add(id(value))
    for name, child in children.items():
        _collect(child, f"{place}.{name}" if place else str(name), found, seen)


def _children(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return {}
    return vars(value)


def replace_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor replaced by what ``change`` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    children = _children(value)
    if not children:
        return value
    changed = {name: replace_tensors(child, change) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return value
    if isinstance(value, Mapping):
        return changed
    if isinstance(value, list | tuple):
        items = list(changed.values())
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **changed)
    result = copy.copy(value)
    vars(result).update(changed)
    return result


def first_image(value: Any, batch_size: int) -> Any:
    """What a batch of the first image alone would be: of every tensor and list of ``batch_size`` entries the first."""
    if isinstance(value, Tensor):
        return value[:1] if value.dim() and value.shape[0] == batch_size else value
    if isinstance(value, list | tuple):
        return value[:1] if len(value) == batch_size else type(value)(first_image(each, batch_size) for each in value)
    if isinstance(value, Mapping):
        return {name: first_image(child, batch_size) for name, child in value.items()}
    return replace_tensors(value, lambda tensor: first_image(tensor, batch_size))
