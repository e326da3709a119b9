"""How the tensors of other code bases are named, as renamings to the names of this package.

A layout is recognised by a key that only it has. Renamings are regular expressions that replace the start of a key
(``\\A``) or one component of it, applied in order.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Layout", "recognize"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        name: for messages.
        marker: a pattern that some key of this layout, and no key of the others, matches at its start.
        renamings: (pattern, replacement) pairs.
        merge: joins tensors that this package keeps as one; applied after the renamings.
    """

    name: str
    marker: str
    renamings: tuple[tuple[str, str], ...] = ()
    merge: Callable[[StateDict], StateDict] = lambda state: state

    def convert(self, state: StateDict) -> StateDict:
        """The same tensors under this package's names."""
        converted = {}
        for key, tensor in state.items():
            for pattern, replacement in self.renamings:
                key = re.sub(pattern, replacement, key)
            converted[key] = tensor
        return self.merge(converted)


def recognize(state: StateDict) -> Layout | None:
    """The layout that a state dict has, or None."""
    for layout in LAYOUTS:
        if any(re.match(layout.marker, key) for key in state):
            return layout
    return None


def _merge_attention_inputs(state: StateDict) -> StateDict:
    """Stack separate query, key and value projections of the encoder into ``in_proj_weight`` and ``in_proj_bias``."""
    merged = dict(state)
    for key in state:
        found = re.fullmatch(r"(encoder\.layers\.\d+\.self_attn)\.q_proj\.(weight|bias)", key)
        if found:
            prefix, kind = found.groups()
            parts = [merged.pop(f"{prefix}.{part}_proj.{kind}") for part in "qkv"]
            merged[f"{prefix}.in_proj_{kind}"] = torch.cat(parts)
    return merged


# transformers' own ResNet, for models that were made without timm
_TRANSFORMERS_RESNET = (
    (r"\Abackbone\.body\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"\Abackbone\.body\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    *((rf"\Abackbone\.body\.encoder\.stages\.{i}\.layers\.", f"backbone.body.layer{i + 1}.") for i in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(3)),
    *((rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(3)),
)

# names of transformers 5; those of transformers 4 that differ follow in the same table
_TRANSFORMERS = (
    (r"\Amodel\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone.body."),
    *_TRANSFORMERS_RESNET,
    (r"\Amodel\.", ""),
    (r"\Ainput_projection\.", "input_proj."),
    (r"\Aquery_position_embeddings\.", "query_embed."),
    (r"\Aclass_labels_classifier\.", "class_embed."),
    (r"\Abbox_predictor\.", "bbox_embed."),
    (r"\Adecoder\.layernorm\.", "decoder.norm."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"\A(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\A(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"\A(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"\A(decoder\.layers\.\d+)\.self_attn\.([qk])_(content|pos)_proj\.", r"\1.sa_\2\3_proj."),
    (r"\A(decoder\.layers\.\d+)\.self_attn\.v_proj\.", r"\1.sa_v_proj."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn\.([qk])_(content|pos)_proj\.", r"\1.ca_\2\3_proj."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn\.q_pos_sine_proj\.", r"\1.ca_qpos_sine_proj."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn\.v_proj\.", r"\1.ca_v_proj."),
    (r"\A(decoder\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
)

LAYOUTS = (
    Layout("groupdetr_fast", r"decoder\.layers\.0\."),
    Layout(
        "the original repository",
        r"transformer\.decoder\.layers\.0\.",
        ((r"\Abackbone\.0\.body\.", "backbone.body."), (r"\Atransformer\.", "")),
    ),
    Layout("transformers", r"model\.decoder\.layers\.0\.", _TRANSFORMERS, _merge_attention_inputs),
)
