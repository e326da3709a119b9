"""Conditional DETR, and Group DETR's own code, which is a branch of it."""

from pathlib import Path
from typing import Any

from .checkout import Checkout, backbone_builder, is_small
from .original import Original, sizes

__all__ = ["conditional_detr", "group_detr"]

REPOSITORY = "https://github.com/Atten4Vis/ConditionalDETR"


def conditional_detr(folder: Path, ours: Any) -> Original:
    """The original Conditional DETR with the sizes of ours."""
    return _build(Checkout(folder, REPOSITORY, "models/conditional_detr.py"), ours)


def group_detr(folder: Path, ours: Any) -> Original:
    """Group DETR's Conditional DETR with the sizes and the groups of ours."""
    # The branch adds this file.
    checkout = Checkout(folder, f"{REPOSITORY}, branch GroupDETR", "scripts/conddetr_r50_epoch12_groupdetr11.sh")
    return _build(checkout, ours, group_detr=ours.config.num_groups)


def _build(checkout: Checkout, ours: Any, **settings: Any) -> Original:
    code = checkout.modules("", ("conditional_detr",), resnet=not is_small(ours))
    module, chosen = code["conditional_detr"], checkout.defaults(**sizes(ours.config), **settings)
    module.build_backbone = backbone_builder(code, ours, chosen)
    return Original(module.build(chosen), code["util.misc"].NestedTensor)
