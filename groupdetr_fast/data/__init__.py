"""COCO-format data sets, the paper's augmentation, batches, and the embedded digits set (extra ``train``)."""

from .annotations import DataError
from .batch import Batch, collate
from .coco import CocoDataset
from .copy_paste import CopyPaste
from .digits import DigitsConfig, DigitsPaths, digits_dataset
from .layouts import find_data
from .own_transforms import OwnTransforms
from .sampling import EpochSampler
from .transforms import AugmentationConfig, eval_transforms, train_transforms
from .unreadable import SkipUnreadable

__all__ = [
    "AugmentationConfig",
    "Batch",
    "CocoDataset",
    "CopyPaste",
    "DataError",
    "DigitsConfig",
    "DigitsPaths",
    "EpochSampler",
    "OwnTransforms",
    "SkipUnreadable",
    "collate",
    "digits_dataset",
    "eval_transforms",
    "find_data",
    "train_transforms",
]
