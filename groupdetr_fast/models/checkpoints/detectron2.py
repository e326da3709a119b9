"""detectron2's names of the tensors of Mask2Former, which are those of its original repository."""

import re

__all__ = ["detectron2_key"]

_HEAD = "sem_seg_head"
_LAYERS = rf"{_HEAD}.predictor.transformer"

# this package's names to detectron2's, applied in order
_RENAMINGS = (
    (r"\Abackbone\.body\.(conv1|bn1)\.", r"backbone.stem.\1."),
    *((rf"\Abackbone\.body\.layer{i}\.", f"backbone.res{i + 1}.") for i in range(1, 5)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\Apixel_decoder\.(encoder\.|level_embed)", r"pixel_decoder.transformer.\1"),
    *(
        (rf"\Apixel_decoder\.{part}\.{index}\.", f"pixel_decoder.{theirs}.{suffix}")
        for part, theirs in (("lateral", "adapter_1"), ("smooth", "layer_1"))
        for index, suffix in enumerate(("", "norm."))
    ),
    (r"\Apixel_decoder\.", f"{_HEAD}.pixel_decoder."),
    (r"\Adecoder\.layers\.(\d+)\.cross_attn\.", rf"{_LAYERS}_cross_attention_layers.\1.multihead_attn."),
    (r"\Adecoder\.layers\.(\d+)\.norm1\.", rf"{_LAYERS}_cross_attention_layers.\1.norm."),
    (r"\Adecoder\.layers\.(\d+)\.self_attn\.", rf"{_LAYERS}_self_attention_layers.\1.self_attn."),
    (r"\Adecoder\.layers\.(\d+)\.norm2\.", rf"{_LAYERS}_self_attention_layers.\1.norm."),
    (r"\Adecoder\.layers\.(\d+)\.(linear[12])\.", rf"{_LAYERS}_ffn_layers.\1.\2."),
    (r"\Adecoder\.layers\.(\d+)\.norm3\.", rf"{_LAYERS}_ffn_layers.\1.norm."),
    (r"\Adecoder\.norm\.", f"{_HEAD}.predictor.decoder_norm."),
    (r"\A(?:decoder\.)?(level_embed|query_feat|query_embed|class_embed|mask_embed)\.", rf"{_HEAD}.predictor.\1."),
)


def detectron2_key(name: str) -> str:
    """The key of a tensor of ``Mask2Former`` in the files of its original repository."""
    for pattern, replacement in _RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name
