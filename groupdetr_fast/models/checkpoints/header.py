"""What a file of this package says of its model beside the weights, and the detector that follows from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..detector import Detector
from ..registry import build_model, model_config

__all__ = ["CheckpointHeader", "build_detector"]


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """The header of a weights file, from which its model can be built and used without the training.

    Every field has a default, since older files lack some of them, and files of other code lack all.

    Attributes:
        model: name of the detector; None if the file does not say.
        model_config: settings of the detector, by name.
        categories: COCO's entries, ascending by id.
        labels: "contiguous" or "category_id", what the class numbers of the detector are.
        evaluation: sizes and normalisation of images in evaluation, settings of ``AugmentationConfig`` by name.
        epoch: finished epochs.
        AP: of the weights, in [0, 1]; None where they were not evaluated.
    """

    model: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    categories: list[dict[str, Any]] = field(default_factory=list)
    labels: str = "category_id"
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    AP: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The header as an object of json, without what it does not say."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CheckpointHeader":
        """The header that :meth:`to_json` made into ``content``; keys that are no fields are ignored."""
        return cls(**{each.name: content[each.name] for each in fields(cls) if each.name in content})


def build_detector(header: CheckpointHeader, **changes: Any) -> Detector:
    """The detector of a checkpoint, with random weights everywhere, for those of the checkpoint to replace.

    Args:
        header: of the checkpoint. Settings that it does not have are those of the detector by default.
        **changes: settings that differ.

    Raises:
        ValueError: as :func:`build_model`, and if the header does not say which detector it is of.
    """
    if header.model is None:
        raise ValueError("the checkpoint does not say which detector it is of")
    default = model_config(header.model)
    settings = {"num_classes": default.num_classes, "num_groups": default.num_groups, **header.model_config, **changes}
    return build_model(header.model, **{**settings, "backbone_weights": None})
