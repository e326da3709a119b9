"""DINO with four scales and a ResNet's features."""

import re
import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

import groupdetr_fast as gd

from .checkout import Checkout, backbone_builder, is_small, use_pure_deformable_attention
from .original import Original, predictions, sizes, targets_of

__all__ = ["dino"]

REPOSITORY = "https://github.com/IDEA-Research/DINO"
CONFIG = "config/DINO/DINO_4scale.py"


def dino(folder: Path, ours: Any, *, plain_giou: bool = False) -> Original:
    """The original DINO with the sizes of ours, and else the settings of its 4-scale configuration."""
    checkout = Checkout(folder, REPOSITORY, CONFIG, plain_giou)
    attention, function = "ops.modules.ms_deform_attn", "ops.functions.ms_deform_attn_func"
    code = checkout.modules("dino", ("dino", attention, function), resnet=not is_small(ours))
    use_pure_deformable_attention(code[attention], code[function])
    changed = sizes(ours.config) | {"dn_number": ours.config.denoising_queries, "device": "cpu"}
    settings = Namespace(**(runpy.run_path(str(folder / CONFIG)) | changed))
    code["dino"].build_backbone = backbone_builder(code, ours, settings, levels=True)
    return _Dino(code["dino"].build_dino(settings), code["util.misc"].NestedTensor)


class _Dino(Original):
    def detect(self, images: Tensor, masks: Tensor, targets: gd.PackedTargets) -> tuple[dict[str, Tensor], Any]:
        out = self.net(self.nested(images, masks), targets_of(targets))
        denoising, encoder = out["dn_meta"].get("output_known_lbs_bboxes"), out["interm_outputs"]
        selected = {"encoder logits": encoder["pred_logits"], "encoder boxes": encoder["pred_boxes"]}
        if denoising is not None:  # there are objects
            selected |= predictions(denoising, "denoising ")
        return predictions(out) | selected, out

    def loss_name(self, name: str) -> str:
        return re.sub("_interm$", "_enc", name)
