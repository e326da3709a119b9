"""Where the data of a run are, and how they are read."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from ..field_types import take_field_types
from .annotations import DataError
from .layouts import find_data

__all__ = ["MOST_WORKERS", "DataConfig", "DataPaths", "Split", "usable_cores"]

Split = Literal["val", "test"]
Paths = TypeVar("Paths", bound="DataPaths")

MOST_WORKERS = 8  # by default: about 800 images a second, and half a gigabyte for each

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of containers and batch systems on Linux


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """Where the images and annotations are.

    Attributes:
        data_path: folder of a data set in COCO's layout, that of Roboflow's COCO export, or YOLO's.
        coco_path: folder with COCO's ``train2017/``, ``val2017/`` and ``annotations/``; or name the four below.
        train_images: folder of the images to train on.
        train_annotations: COCO json to train on.
        val_images: folder of the images to evaluate on.
        val_annotations: COCO json to evaluate on.
    """

    data_path: Path | None = None
    coco_path: Path | None = None
    train_images: Path | None = None
    train_annotations: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None

    @property
    def given(self) -> bool:
        """Whether any of these places is given."""
        return any(getattr(self, each.name) for each in fields(DataPaths))

    def train_paths(self) -> tuple[Path, Path]:
        """Folder of images and annotation file to train on.

        Raises:
            DataError: if they are not given, or are given twice.
        """
        return self._paths("train", self.train_images, self.train_annotations)

    def val_paths(self) -> tuple[Path, Path]:
        """Folder of images and annotation file to evaluate on; raises as :meth:`train_paths`."""
        return self._paths("val", self.val_images, self.val_annotations)

    def test_paths(self) -> tuple[Path, Path]:
        """Folder of images and annotation file of the part ``test``, which no training sees.

        Raises:
            DataError: if there is no ``data_path``, or no such part in it, or data are given twice.
        """
        self._check_given_once()
        if self.data_path is None:
            raise DataError(
                'split "test" is a part of data_path; name the files of other data by val_images and val_annotations'
            )
        return find_data(self.data_path, "test")

    def evaluated_on(self: Paths, split: Split) -> Paths:
        """The same data, with that part of ``data_path`` as the one to evaluate on.

        Raises:
            DataError: as :meth:`test_paths`.
            ValueError: for another split than "val" and "test".
        """
        if split not in ("val", "test"):
            raise ValueError(f'split must be "val" or "test", got {split!r}')
        if split == "val":
            return self
        images, annotations = self.test_paths()
        return replace(self, data_path=None, val_images=images, val_annotations=annotations)

    def _check_given_once(self) -> None:
        files = any((self.train_images, self.train_annotations, self.val_images, self.val_annotations))
        if (self.data_path is not None) + (self.coco_path is not None) + files > 1:
            raise DataError("give data_path, coco_path, or the four of train and val images and annotations: only one")

    def _paths(self, part: str, images: Path | None, annotations: Path | None) -> tuple[Path, Path]:
        self._check_given_once()
        if self.data_path is not None:
            return find_data(self.data_path, part)
        if self.coco_path is not None:
            return self.coco_path / f"{part}2017", self.coco_path / "annotations" / f"instances_{part}2017.json"
        if images is None or annotations is None:
            raise DataError(f"give data_path, coco_path, or both {part}_images and {part}_annotations")
        return images, annotations


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataPaths):
    """The images and annotations, and how they are read.

    Attributes:
        labels: "contiguous" numbers the categories 0, 1, ... in the order of their ids; "category_id" uses the ids
            themselves, as the original repositories do (91 classes on COCO).
        workers: processes that load images, per training process; None for as many as there are cores for each of the
            training processes of this machine, at least 1 and at most 8.
        prefetch_factor: batches that each worker loads ahead; None for those of the next step and one more, which keep
            the device busy.
        cache_images: keep decoded images in memory; for small data sets.
        cache_on: with ``cache_images``, in which memory: "host"; "device", that of the GPU, with resized and mirrored
            images, so that neither images nor objects pass through the host again (without workers, for
            augmentations of one size without crops; refused where they take more than half of the free memory); or
            "auto", the device where that is possible and else the host.
        filter_empty: train only on images that have objects, as Mask2Former's repository does.
        repeat_factor_threshold: share of images below which a class is rare: its images come more often in an epoch, by
            the square root of this over its share (LVIS: 0.001); 0 for no repetition.
        max_unreadable_images: images to train on that may be missing or damaged, over all processes; another one stands
            in for each.
    """

    labels: Literal["contiguous", "category_id"] = "contiguous"
    workers: int | None = None
    prefetch_factor: int | None = None
    cache_images: bool = False
    cache_on: Literal["host", "device", "auto"] = "host"
    filter_empty: bool = False
    repeat_factor_threshold: float = 0.0
    max_unreadable_images: int = 10

    def __post_init__(self) -> None:
        take_field_types(self, DataConfig)
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.prefetch_factor is not None and self.prefetch_factor < 1:
            raise ValueError(f"prefetch_factor must be at least 1, got {self.prefetch_factor}")
        if self.cache_on != "host" and not self.cache_images:
            raise ValueError(f"cache_on {self.cache_on} says where images are kept: give cache_images, too")
        if self.cache_on == "device" and self.workers:
            raise ValueError(
                f"workers load images on the host: leave workers out with cache_on device, got {self.workers}"
            )
        if self.max_unreadable_images < 0:
            raise ValueError(f"max_unreadable_images must not be negative, got {self.max_unreadable_images}")
        if not 0 <= self.repeat_factor_threshold <= 1:
            raise ValueError(f"repeat_factor_threshold must be a share in [0, 1], got {self.repeat_factor_threshold}")

    def resolved_workers(self) -> int:
        """``workers``, or what None stands for on this machine; none where images lie on the device."""
        if self.cache_on == "device":
            return 0
        if self.workers is not None:
            return self.workers
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # which torchrun and accelerate launch set
        return min(max(usable_cores() // processes, 1), MOST_WORKERS)


def usable_cores() -> int:
    """Cores that this process may use: those that it is bound to, and no more than its control group gets time of."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max", which is no limit
        return cores
