"""DAB-DETR, and how it is built, as DN-DETR is too."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .checkout import Checkout, backbone_builder, is_small
from .original import Original, sizes

__all__ = ["build_network", "dab_detr"]

REPOSITORY = "https://github.com/IDEA-Research/DAB-DETR"


def dab_detr(folder: Path, ours: Any, *, plain_giou: bool = False) -> Original:
    """The original DAB-DETR with the sizes and the classes of ours."""
    checkout = Checkout(folder, REPOSITORY, "models/DAB_DETR/DABDETR.py", plain_giou)
    code = checkout.modules("DAB_DETR", ("DABDETR", "transformer"), resnet=not is_small(ours))
    settings = checkout.defaults("--modelname", "dab_detr", "--coco_path", "", **sizes(ours.config))
    return Original(build_network(code, settings, ours), code["util.misc"].NestedTensor)


def build_network(code: Mapping[str, ModuleType], settings: Namespace, ours: Any) -> tuple[Any, ...]:
    """What the repository's function returns, with two things as ours has them that it fixes.

    These are the number of classes, and, where ours has other sizes, 256 channels of one part of the encoder.
    """
    module, dim, classes = code["DABDETR"], ours.config.d_model, ours.config.num_classes
    build_transformer, network, losses = module.build_transformer, module.DABDETR, module.SetCriterion

    def transformer(settings: Namespace) -> nn.Module:
        made = build_transformer(settings)
        scale = made.encoder.query_scale = code["transformer"].MLP(dim, dim, dim, 2)
        for layer in scale.layers:
            nn.init.xavier_uniform_(layer.weight)
        return made

    if dim != 256:
        module.build_transformer = transformer
    module.build_backbone = backbone_builder(code, ours, settings)
    module.DABDETR = lambda *parts, **options: network(*parts, **(options | {"num_classes": classes}))
    module.SetCriterion = lambda _, **options: losses(classes, **options)
    return module.build_DABDETR(settings)
