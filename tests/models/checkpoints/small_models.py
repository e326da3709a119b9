"""Detectors that are built in no time, with weights of which every one matters."""

import torch

import groupdetr_fast as gd

SIZES = {
    "num_queries": 10,
    "d_model": 64,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "dim_feedforward": 96,
    "backbone": "resnet18",
}
DETECTORS = ["conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dab_deformable_detr_r50", "dino_4scale_r50"]


def build(name="conditional_detr_r50", num_groups=1, num_classes=7, **overrides):
    return gd.build_model(name, num_classes=num_classes, num_groups=num_groups, **{**SIZES, **overrides})


def randomize(model):
    """Weights and statistics far from their initial values."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "backbone" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return model


def padded_batch():
    images = torch.randn(2, 3, 96, 128)
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    masks[1, 70:] = True
    masks[1, :, 90:] = True
    return images.masked_fill(masks[:, None], 0), masks


def same_weights(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[key], others[key]) for key in state)
