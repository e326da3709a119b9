"""What a checkpoint is, from the names of its tensors."""

import re
from collections.abc import Iterable

from ..detector import Detector
from .layouts import CheckpointMismatch, Converted, Layout, StateDict, gather
from .mask2former import MASK2FORMER, TRANSFORMERS_MASK2FORMER
from .original import ORIGINAL
from .transformers import TRANSFORMERS

__all__ = ["recognize_detector", "recognize_layout"]


def _convert(state: StateDict, model: Detector) -> Converted:
    return gather({name: [name] for name in model.state_dict() if name in state}, state)


OWN = Layout("groupdetr_fast", r"decoder\.layers\.0\.", _convert)
LAYOUTS = (OWN, ORIGINAL, TRANSFORMERS, MASK2FORMER, TRANSFORMERS_MASK2FORMER)

# detector: parts of names which its checkpoints have in every layout, and no detector further up has all of
_DETECTORS = {
    "Mask2Former": ("mask_embed",),
    "DINO": ("enc_output.", "tgt_embed."),
    "two-stage Deformable DETR": ("enc_output.",),
    "DAB-Deformable-DETR": ("sampling_offsets.", "refpoint_embed."),
    "Deformable DETR": ("sampling_offsets.",),
    "DN-DETR": ("ref_anchor_head.", "label_enc."),
    "DAB-DETR": ("ref_anchor_head.",),
    "Conditional DETR": ("query_scale.",),
    "DETR": ("query_embed.",),
}


def recognize_layout(state: StateDict) -> Layout:
    """The layout that a state dict has.

    Raises:
        CheckpointMismatch: if it has none of those that are known.
    """
    for layout in LAYOUTS:
        if any(re.match(layout.marker, key) for key in state):
            return layout
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise CheckpointMismatch(
        f"the checkpoint's tensor names (such as {next(iter(state))}) are those of none of: {known}"
    )


def recognize_detector(keys: Iterable[str]) -> str | None:
    """The detector that a checkpoint seems to be of, for messages."""
    keys = list(keys)
    for detector, parts in _DETECTORS.items():
        if all(any(part in key for key in keys) for part in parts):
            return detector
    return None
