"""What a checkpoint says beside its weights: classes, sizes of images, normalisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..data import AugmentationConfig
from ..data.categories import class_table
from ..models.checkpoints import CheckpointHeader

__all__ = ["InferenceSettings", "settings_of"]


@dataclass(frozen=True)
class InferenceSettings:
    """What a checkpoint says beside its weights.

    Attributes:
        class_names: of the labels; a label beyond them is named by its number.
        category_ids: COCO's category id of each label; None where labels are category ids.
        augmentation: of which the sizes in evaluation, the mean and the deviation count.
    """

    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    @classmethod
    def from_header(cls, header: CheckpointHeader) -> "InferenceSettings":
        """The settings in the header of a checkpoint of this package; the defaults where it has none."""
        settings = cls(augmentation=AugmentationConfig(**header.evaluation))
        if header.categories:
            settings = settings.with_categories(header.categories, header.labels)
        return settings

    def with_categories(self, categories: Sequence[Mapping[str, Any]], labels: str) -> "InferenceSettings":
        """The same settings with the classes of another table; see :func:`class_table`."""
        names, ids = class_table(categories, labels)
        return replace(self, class_names=names, category_ids=ids)

    def with_sizes(self, **settings: Any) -> "InferenceSettings":
        """The same settings with some of :data:`EVAL_SETTINGS` replaced; None keeps what there is."""
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, augmentation=replace(self.augmentation, **given))

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def settings_of(model: nn.Module) -> InferenceSettings:
    """What the checkpoint of a model said that :func:`load_model` made; the defaults for another model."""
    settings = getattr(model, "inference_settings", None)
    return settings if isinstance(settings, InferenceSettings) else InferenceSettings()
