"""Tiny models of transformers, with random weights, and batches for them."""

import torch
import transformers

CLASSES, QUERIES, GROUPS = 4, 5, 3  # GROUPS: of LW-DETR and RF-DETR
TEXTS_LEARNED = 4  # of OneFormer, which compares its queries with as many texts

_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
_DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
_LW_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "num_queries": QUERIES,
    "group_detr": GROUPS,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "out_indices": [1, 2],
}
_SEGMENTER = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "dim_feedforward": 32,
    "dropout": 0.0,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "train_num_points": 64,
}


def stages(first):
    return [f"stage{index}" for index in range(first, 5)]


def detr_config(name, **overrides):
    options = {
        "hidden_size" if name == "DabDetr" else "d_model": 32,
        "auxiliary_loss": True,
        "backbone_config": transformers.ResNetConfig(
            out_features=stages(3) if name == "DeformableDetr" else stages(4), **_RESNET
        ),
        "backbone": None,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    }
    if name == "DeformableDetr":
        options |= {"num_feature_levels": 2, "with_box_refine": True}
    return getattr(transformers, f"{name}Config")(**{**_DETR, **options, **overrides})


def hybrid_config(name, **overrides):
    """Of RT-DETR and its descendants."""
    if name.startswith("RTDetr"):
        backbone = transformers.RTDetrResNetConfig(out_features=stages(2), **_RESNET)
    else:
        backbone = transformers.HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 8, 16],
            stage_mid_channels=[8] * 4,
            stage_out_channels=[8, 8, 16, 16],
            stage_num_blocks=[1] * 4,
            stage_downsample=[False, True, True, True],
            stage_light_block=[False] * 4,
            stage_kernel_size=[3] * 4,
            stage_numb_of_layers=[1] * 4,
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            out_features=stages(1 if name == "PPDocLayoutV3" else 2),
        )
    options = {
        "hidden_size" if name == "PPDocLayoutV4" else "d_model": 32,
        "backbone_config": backbone,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16, 16],
        "decoder_in_channels": [32, 32, 32],
        "num_denoising": 0,  # whose noise is random
    }
    if name in ("DFine", "Deimv2"):
        options["decoder_n_points"] = [3, 2, 1]
    if name == "PPDocLayoutV3":
        options["x4_feat_dim"] = 8
    if name == "PPDocLayoutV2":
        options |= {"class_thresholds": [0.5] * CLASSES, "class_order": list(range(CLASSES))}
        options["reading_order_config"] = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "coordinate_size": 4,
            "shape_size": 4,
            "global_pointer_head_size": 8,
            "relation_bias_embed_dim": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    return getattr(transformers, f"{name}Config")(**{**_DETR, **options, **overrides})


def lw_detr_config(name, **overrides):
    if name == "LwDetr":
        backbone = transformers.LwDetrViTConfig(pretrain_image_size=64, num_windows=4, window_block_indices=[0], **_VIT)
        options = {"projector_scale_factors": [1.0]}
    else:
        backbone, options = transformers.RfDetrDinov2Config(num_windows=2, **_VIT), {}
    options = {"backbone_config": backbone, **_LW_DETR, **options, **overrides}
    return getattr(transformers, f"{name}Config")(**options)


def grounding_config(name, **overrides):
    text = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99
    )
    options = {
        "d_model": 32,
        "backbone_config": transformers.SwinConfig(out_features=stages(2), **_SWIN),
        "text_config": text,
        "fusion_droppath": 0.0,
        "num_feature_levels": 4,
    }
    return getattr(transformers, f"{name}Config")(**{**_DETR, **options, **overrides})


def eomt_config(name, **overrides):
    options = {key: value for key, value in _VIT.items() if key != "out_indices"}
    options |= {"num_hidden_layers": 3, "num_blocks": 2, "num_queries": QUERIES, "num_labels": CLASSES}
    return transformers.EomtConfig(**{**options, "train_num_points": 64, **overrides})


def segmenter_config(name, **overrides):
    options = {"backbone_config": transformers.SwinConfig(out_features=stages(1), **_SWIN), **_SEGMENTER}
    if name == "Mask2Former":
        options |= {"feature_size": 32, "mask_feature_size": 32}
    else:
        options |= {
            "conv_dim": 64,
            "mask_dim": 64,
            "hidden_dim": 64,
            "text_encoder_width": 64,
            "text_encoder_vocab_size": 99,
            "text_encoder_num_layers": 1,
            "text_encoder_n_ctx": TEXTS_LEARNED,
            "is_training": True,
        }
    return getattr(transformers, f"{name}Config")(**{**options, **overrides})


CONFIGS = {
    **dict.fromkeys(["ConditionalDetr", "DabDetr", "DeformableDetr"], detr_config),
    **dict.fromkeys(["LwDetr", "RfDetr"], lw_detr_config),
    **dict.fromkeys(
        ["RTDetr", "RTDetrV2", "DFine", "Deimv2", "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4"], hybrid_config
    ),
    **dict.fromkeys(["GroundingDino", "MMGroundingDino"], grounding_config),
    **dict.fromkeys(["Mask2Former", "OneFormer"], segmenter_config),
    "Eomt": eomt_config,
}
SEGMENTERS = ("Mask2Former", "OneFormer", "Eomt")


def model_of(name, **overrides):
    """A model in training mode, whose layers all matter."""
    torch.manual_seed(2)
    task = "UniversalSegmentation" if name in SEGMENTERS else "ObjectDetection"
    model = getattr(transformers, f"{name}For{task}")(CONFIGS[name](name, **overrides))
    for parameter in model.parameters():  # some layers start at zero, which would hide what their inputs depend on
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.train()


def labels_of(counts, generator=None):
    """Targets with so many objects an image."""
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
        }
        for count in counts
    ]


def inputs_of(name, counts=(3, 1), size=(64, 64), dtype=torch.float32):
    """A batch with so many objects an image: the keywords of ``forward``; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    inputs = {"pixel_values": torch.randn(len(counts), 3, *size, generator=generator)}
    if name in SEGMENTERS:
        labels = labels_of(counts, generator)
        inputs["class_labels"] = [label["class_labels"] for label in labels]
        inputs["mask_labels"] = [torch.rand(count, *size, generator=generator).round() for count in counts]
    if name == "OneFormer":
        inputs["task_inputs"] = torch.randint(99, (len(counts), 77), generator=generator)
        inputs["text_inputs"] = torch.randint(99, (len(counts), QUERIES - TEXTS_LEARNED, 77), generator=generator)
    elif name in ("GroundingDino", "MMGroundingDino"):
        inputs["input_ids"] = torch.tensor([[2, 5, 6, 3]]).repeat(len(counts), 1)
    elif name not in (*SEGMENTERS, "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4"):
        inputs["labels"] = labels_of(counts, generator)
        for label in inputs["labels"]:
            label["boxes"] = label["boxes"].to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs
