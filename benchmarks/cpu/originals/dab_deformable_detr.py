"""DAB-Deformable-DETR, which is in DAB-DETR's repository."""

from pathlib import Path
from typing import Any

from .checkout import Checkout, backbone_builder, is_small, use_pure_deformable_attention
from .dab_detr import REPOSITORY
from .original import Original, sizes

__all__ = ["dab_deformable_detr"]


def dab_deformable_detr(folder: Path, ours: Any, *, plain_giou: bool = False) -> Original:
    """The original DAB-Deformable-DETR with the sizes of ours."""
    checkout = Checkout(folder, REPOSITORY, "models/dab_deformable_detr/dab_deformable_detr.py", plain_giou)
    attention, function = "ops.modules.ms_deform_attn", "ops.functions.ms_deform_attn_func"
    names = ("dab_deformable_detr", attention, function)
    code = checkout.modules("dab_deformable_detr", names, resnet=not is_small(ours))
    use_pure_deformable_attention(code[attention], code[function])
    settings = checkout.defaults("--modelname", "dab_deformable_detr", "--coco_path", "", **sizes(ours.config))
    module = code["dab_deformable_detr"]
    module.build_backbone = backbone_builder(code, ours, settings, levels=True)
    return Original(module.build_dab_deformable_detr(settings), code["util.misc"].NestedTensor)
