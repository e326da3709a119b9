"""The names of Hugging Face transformers, versions 4 and 5, as renamings to the names of this package.

Covered are its Conditional DETR and DAB-DETR, and what Deformable DETR shares with the deformable detectors. Renamings
are regular expressions that replace the start of a key (``\\A``) or one component of it, applied in order.
"""

import re

import torch

from ..detector import Detector
from .layouts import Converted, Layout, StateDict, gather

__all__ = ["RESNET", "TRANSFORMERS", "Renamings", "convert_by_renaming"]

Renamings = tuple[tuple[str, str], ...]

# transformers' own ResNet, for models that were made without timm
RESNET: Renamings = (
    (r"\Abackbone\.body\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"\Abackbone\.body\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    *((rf"\Abackbone\.body\.encoder\.stages\.{i}\.layers\.", f"backbone.body.layer{i + 1}.") for i in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(3)),
    *((rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(3)),
)

_OUTSIDE_THE_LAYERS: Renamings = (
    (r"\Amodel\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone.body."),
    *RESNET,
    (r"\Amodel\.", ""),
    (r"\Ainput_projection\.", "input_proj."),
    (r"\Aquery_position_embeddings\.", "query_embed."),
    (r"\Aquery_refpoint_embeddings\.", "refpoint_embed."),
    (r"\Aclass_labels_classifier\.", "class_embed."),
    (r"\A(decoder\.bbox_embed|bbox_predictor)\.", "bbox_embed."),
    (r"\Adecoder\.class_embed\.", "class_embed."),
    (r"\Adecoder\.layernorm\.", "decoder.norm."),
)

_LAYERS: Renamings = (
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
    (r"\.(?:mlp\.)?activation_fn\.", ".activation."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"\A(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\A(decoder\.layers\.\d+)\.(?:mlp\.)?final_layer_norm\.", r"\1.norm3."),
)

# the decoder layers of Conditional DETR in version 5; version 4 has the names of the original repository
_CONDITIONAL: Renamings = (
    (r"\A(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"\.self_attn\.([qk])_(content|pos)_proj\.", r".sa_\1\2_proj."),
    (r"\A(decoder\.layers\.\d+)\.self_attn\.v_proj\.", r"\1.sa_v_proj."),
    (r"\.encoder_attn\.([qk])_(content|pos)_proj\.", r".ca_\1\2_proj."),
    (r"\.encoder_attn\.q_pos_sine_proj\.", ".ca_qpos_sine_proj."),
    (r"\.encoder_attn\.v_proj\.", ".ca_v_proj."),
    (r"\.encoder_attn\.", ".cross_attn."),
)

# the decoder layers of DAB-DETR, which are split into modules for self-attention and cross-attention
_DAB: Renamings = (
    (r"\.self_attn\.self_attn_layer_norm\.", ".norm1."),
    (r"\.cross_attn\.cross_attn_layer_norm\.", ".norm2."),
    *(
        (rf"\.{kind}_attn\.{kind}_attn_{part}_(?:(\w+)_)?proj\.", rf".{kind[0]}a_{part[0]}\1_proj.")
        for kind in ("self", "cross")
        for part in ("query", "key", "value")
    ),
    (r"\.(self|cross)_attn\.\1_attn\.output_proj\.", r".\1_attn.out_proj."),
)

# the decoder layers of Deformable DETR, whose original repository names the first two norms in this order
_DEFORMABLE: Renamings = (
    (r"\A(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
    (r"\.encoder_attn\.", ".cross_attn."),
)


def _convert(state: StateDict, model: Detector) -> Converted:
    decoder = _CONDITIONAL
    if any(".sampling_offsets." in key for key in state):
        decoder = _DEFORMABLE
    elif any(".self_attn.self_attn_" in key for key in state):
        decoder = _DAB
    return convert_by_renaming(state, model, (*_OUTSIDE_THE_LAYERS, *_LAYERS, *decoder))


def convert_by_renaming(state: StateDict, model: Detector, renamings: Renamings) -> Converted:
    """Sort a checkpoint by the names of a model, which ``renamings`` make of its keys."""
    state = _join_attention_inputs(state)
    names = model.state_dict()
    sources: dict[str, list[str]] = {}
    for key in state:
        name = key
        for pattern, replacement in renamings:
            name = re.sub(pattern, replacement, name)
        if name in names:
            sources.setdefault(name, []).append(key)
    return gather(sources, state)


def _join_attention_inputs(state: StateDict) -> StateDict:
    """Stack separate projections of queries, keys and values where this package has one, ``in_proj``."""
    joined = dict(state)
    for key in state:
        found = re.fullmatch(r"(.*\.layers\.\d+\.self_attn)\.q_proj\.(weight|bias)", key)
        if found:
            attention, kind = found.groups()
            parts = [joined.pop(f"{attention}.{part}_proj.{kind}") for part in "qkv"]
            joined[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    return joined


TRANSFORMERS = Layout("transformers", r"model\.decoder\.layers\.0\.", _convert)
