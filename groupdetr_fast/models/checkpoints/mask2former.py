"""The layouts of Mask2Former: of its original repository, on detectron2, and of transformers."""

import re

from ..detector import Detector
from .layouts import Converted, Layout, StateDict
from .original import convert_original
from .transformers import RESNET, Renamings, convert_by_renaming

__all__ = ["MASK2FORMER", "TRANSFORMERS_MASK2FORMER"]

# Names that older files of the original repository have, and what its code makes of them.
_OLD: Renamings = (
    (r"\Asem_seg_head\.(?!predictor\.|pixel_decoder\.)", "sem_seg_head.pixel_decoder."),
    (r"\.static_query\.", ".query_feat."),
)

_TRANSFORMERS: Renamings = (
    (r"\Amodel\.pixel_level_module\.encoder\.", "backbone.body."),
    *RESNET,
    (r"\Amodel\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"\Apixel_decoder\.input_projections\.", "pixel_decoder.input_proj."),
    (r"\Apixel_decoder\.mask_projection\.", "pixel_decoder.mask_features."),
    (r"\Apixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (r"\Apixel_decoder\.layer_1\.", "pixel_decoder.smooth."),
    (r"\A(pixel_decoder\.encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(pixel_decoder\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\Amodel\.transformer_module\.", ""),
    (r"\Alevel_embed\.", "decoder.level_embed."),
    (r"\Aqueries_embedder\.", "query_embed."),
    (r"\Aqueries_features\.", "query_feat."),
    (r"\Adecoder\.layernorm\.", "decoder.norm."),
    (r"\Adecoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"mask_embed.layers.\1."),
    (r"\A(decoder\.layers\.\d+)\.cross_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"\A(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"\Aclass_predictor\.", "class_embed."),
)


def _without_criterion(state: StateDict) -> StateDict:
    """Without the weights of the classes in the loss, a setting that both code bases save with the model."""
    return {key: tensor for key, tensor in state.items() if key != "criterion.empty_weight"}


def _convert_original(state: StateDict, model: Detector) -> Converted:
    renamed = {}
    for key, tensor in _without_criterion(state).items():
        for pattern, replacement in _OLD:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return convert_original(renamed, model)


def _convert_transformers(state: StateDict, model: Detector) -> Converted:
    return convert_by_renaming(_without_criterion(state), model, _TRANSFORMERS)


MASK2FORMER = Layout("the original repository", r"sem_seg_head\.", _convert_original)
TRANSFORMERS_MASK2FORMER = Layout("transformers", r"model\.pixel_level_module\.", _convert_transformers)
