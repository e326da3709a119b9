"""The parts of Ultralytics' RT-DETR that this package's kernels stand in for, exchanged in any module and put back."""

from torch import nn
from ultralytics import __version__

from ..kernels import can_serve, exchange_parts, serves_everywhere
from . import attention, criterion, groups

__all__ = ["NEEDED", "TESTED", "exchange", "put_back"]

TESTED = ((8, 4, 190), (8, 4))  # the first version and the last minor version of ultralytics that the tests ran with
NEEDED = "ultralytics>=8.4.190,<8.5"


def exchange(module: nn.Module) -> bool:
    """Exchange, in place, what a module has of them.

    Returns:
        Whether they are exchanged now; if not, the caller's caller is warned.

    Raises:
        ValueError: if there is nothing to exchange.
    """
    exchanges = [attention.exchange] if attention.DEVICES else []
    exchanges += [criterion.exchange] if serves_everywhere("linear_assignment") else []
    if not can_serve("ultralytics", __version__, TESTED, has_kernels=bool(exchanges), stacklevel=4):
        return False
    if not exchange_parts(list(module.modules()), exchanges):
        raise ValueError(f"{type(module).__name__} has neither Ultralytics' deformable attention nor its RT-DETR")
    return True


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange` in place. Of groups of queries the first stays."""
    for part in list(module.modules()):
        if groups.has_groups(part):
            groups.remove_groups(part)
        attention.put_back(part)
        criterion.put_back(part)
