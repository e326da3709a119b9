"""DAB-Deformable-DETR, which is in DAB-DETR's repository."""

from pathlib import Path
from typing import Any

from .checkout import Checkout, Features, use_pure_deformable_attention
from .dab_detr import REPOSITORY
from .original import Original, sizes

__all__ = ["dab_deformable_detr"]


def dab_deformable_detr(folder: Path, ours: Any, *, plain_giou: bool = False) -> Original:
    """The original DAB-Deformable-DETR with the sizes of ours."""
    checkout = Checkout(folder, REPOSITORY, "models/dab_deformable_detr/dab_deformable_detr.py", plain_giou)
    attention, function = "ops.modules.ms_deform_attn", "ops.functions.ms_deform_attn_func"
    names = ("dab_deformable_detr", "position_encoding", attention, function)
    code = checkout.modules("dab_deformable_detr", names)
    use_pure_deformable_attention(code[attention], code[function])
    settings = checkout.defaults("--modelname", "dab_deformable_detr", "--coco_path", "", **sizes(ours.config))
    module, nested = code["dab_deformable_detr"], code["util.misc"].NestedTensor
    position = code["position_encoding"].build_position_encoding(settings)
    module.build_backbone = lambda _: Features(ours.backbone, position, nested, levels=True)
    return Original(module.build_dab_deformable_detr(settings), nested)
