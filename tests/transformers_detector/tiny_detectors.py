"""Tiny detectors of transformers, with random weights, and batches for them."""

import sys
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from tiny_transformers import CLASSES, CONFIGS, QUERIES, detr_config

from groupdetr_fast.targets import PackedTargets
from groupdetr_fast.transformers_detector.detector import TransformersDetector
from groupdetr_fast.transformers_detector.families import FAMILIES

__all__ = [
    "CLASSES",
    "GROUPS",
    "NAMES",
    "QUERIES",
    "batch_of",
    "detector_of",
    "model_like",
    "processor_of",
    "targets_of",
]

# In the order of FAMILIES.
NAMES = dict(
    zip(
        ["Detr", "ConditionalDetr", "DabDetr", "DeformableDetr", "RTDetr", "RTDetrV2", "DFine", "Deimv2", "LwDetr"],
        FAMILIES,
        strict=False,
    )
)
NAMES["RfDetr"] = "rf_detr"
GROUPS = 3  # of LW-DETR and RF-DETR


def model_like(detector, name, **overrides):
    """The model of transformers with the weights and the modes of a detector."""
    model = model_of(name, **overrides)
    model.load_state_dict(detector.model.state_dict())
    for ours, theirs in zip(detector.model.modules(), model.modules(), strict=True):
        theirs.training = ours.training
    return model


def model_of(name, **overrides):
    torch.manual_seed(2)
    config = detr_config(name, **overrides) if name == "Detr" else CONFIGS[name](name, **overrides)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    for parameter in model.parameters():  # some layers start at zero, which would hide what their inputs depend on
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.train()


def processor_of(name, **overrides):
    """The processor of a model, whose images are small."""
    size = {"height": 64, "width": 64} if "DFine" in name or "RTDetr" in name else {"shortest_edge": 64}
    return getattr(transformers, FAMILIES[NAMES[name]].processor)(size=size, **overrides)


def detector_of(name, *, num_groups=None, accelerate_kernels=True, **overrides):
    """A detector whose batch norms keep their statistics, so that a batch has no influence on another."""
    groups = num_groups or (GROUPS if name in ("LwDetr", "RfDetr") else 1)
    processor = processor_of(name).to_dict()
    model = model_of(name, **overrides)
    detector = TransformersDetector(model, processor, num_groups=groups, accelerate_kernels=accelerate_kernels)
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0  # else all activations would vanish
    with torch.no_grad():
        detector.train()(batch_of((0, 0))[0])
    for norm in norms:
        norm.eval()
    return detector


def targets_of(counts, generator=None):
    return PackedTargets.from_list(
        [
            {
                "labels": torch.randint(CLASSES, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
            }
            for count in counts
        ]
    )


def batch_of(counts, size=(64, 64), seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(counts), 3, *size, generator=generator), targets_of(counts, generator)
