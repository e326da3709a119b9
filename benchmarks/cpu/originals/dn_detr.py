"""DN-DETR upon DAB-DETR."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

import groupdetr_fast as gd

from .checkout import Checkout, is_small
from .dab_detr import build_network
from .original import Original, predictions, sizes, targets_of

__all__ = ["dn_detr"]

REPOSITORY = "https://github.com/IDEA-Research/DN-DETR"


def dn_detr(folder: Path, ours: Any, *, plain_giou: bool = False) -> Original:
    """The original DN-DETR with the sizes of ours."""
    checkout = Checkout(folder, REPOSITORY, "models/DN_DAB_DETR/DABDETR.py", plain_giou)
    code = checkout.modules("DN_DAB_DETR", ("DABDETR", "transformer"), resnet=not is_small(ours))
    settings = checkout.defaults("--modelname", "dn_dab_detr", "--coco_path", "", "--use_dn", **sizes(ours.config))
    noise = (settings.scalar, settings.label_noise_scale, settings.box_noise_scale, settings.num_patterns)
    return _DnDetr(build_network(code, settings, ours), code["util.misc"].NestedTensor, noise)


class _DnDetr(Original):
    """As ``engine.py`` of the repository trains it.

    Args:
        noise: of denoising: groups, noise on labels and on boxes, patterns.
    """

    def __init__(self, built: tuple[Any, ...], nested: type, noise: tuple[Any, ...]):
        super().__init__(built, nested)
        self.noise = noise

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Any]:
        return self.net(self.nested(images, masks), dn_args=self.noise[-1])[0]

    def detect(self, images: Tensor, masks: Tensor, targets: gd.PackedTargets) -> tuple[dict[str, Tensor], Any]:
        out, denoising = self.net(self.nested(images, masks), dn_args=(targets_of(targets), *self.noise))
        found = predictions(out)
        if "output_known_lbs_bboxes" in denoising:  # there are objects
            found["denoising logits"], found["denoising boxes"] = denoising["output_known_lbs_bboxes"]
        return found, (out, denoising)

    def all_losses(self, out: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        matching, denoising = out
        return self.criterion(matching, targets, denoising)

    def loss_name(self, name: str) -> str:
        return re.sub(r"^tgt_(loss_[a-z]+)", r"\1_dn", name)
