"""A checkpoint of a small detector with random weights."""

import json

from safetensors.torch import save_file

import groupdetr_fast as gd

CATEGORIES = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 11, "name": "bird"}]
SIZES = {"num_queries": 4, "d_model": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


def write_checkpoint(folder, name="conditional_detr_r50", **settings):
    settings = {**SIZES, "dim_feedforward": 16, "backbone": "conv:8-16", **settings}
    model = gd.build_model(name, num_classes=3, num_groups=1, **settings)
    metadata = {
        "model": name,
        "model_config": {**settings, "num_classes": 3, "num_groups": 1},
        "categories": CATEGORIES,
    }
    metadata |= {"labels": "contiguous", "evaluation": {"eval_short_side": 32}}
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"groupdetr_fast": json.dumps(metadata)})
    return path
