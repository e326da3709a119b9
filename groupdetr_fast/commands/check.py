"""The command ``groupdetr check``."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track

from ..data import DataError
from ..data.annotations import read_annotations, read_coco
from ..data.check import Findings, Statistics, check_part, compare_parts
from ..data.config import DataPaths, usable_cores
from ..data.layouts import find_yolo, has_part
from ..data.yolo import read_yolo
from ..models.registry import model_config
from ..runs.config import ModelConfig
from .text import shown

__all__ = ["CheckCommand"]

NAME, MESSAGE = 60, 600  # characters that are shown


@dataclass(frozen=True, kw_only=True)
class CheckCommand(DataPaths):
    """List what is wrong with a data set, before a night is lost on it. The exit status is 1 if there are errors.

    Errors are what stops a training: images that are missing or damaged, ids that are not in the tables or occur twice.
    Warnings are what is dropped, clipped or deserves a look: empty boxes, boxes outside their image, classes without
    objects, images with more objects than queries, images that are in train and val.

    Attributes:
        folder: the same as data_path.
        model: the detector to be trained, which says the number of queries.
        num_queries: N, queries of one group, where it is not the detector's default.
        decode: decode every image, and compare those of train and val; without, only their headers are read.
        workers: threads that read images.
        limit: messages of one kind that are shown.
    """

    folder: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FOLDER]")]] = None
    model: str = ModelConfig.model
    num_queries: int | None = None
    decode: bool = True
    workers: int = field(default_factory=usable_cores)
    limit: int = 20

    def __post_init__(self) -> None:
        for name, least in {"num_queries": 1, "workers": 1, "limit": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def __call__(self) -> None:
        findings = self.findings()
        for part in findings:
            if part.checked:
                _print_statistics(part)
        counts = {"error": 0, "warning": 0}
        for kind in counts:
            for part in findings:
                for messages in (part.errors if kind == "error" else part.warnings).values():
                    counts[kind] += len(messages)
                    _print_messages(kind, messages, self.limit)
        errors, warnings = (f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())
        if counts["error"]:
            raise DataError(f"the data set has {errors} and {warnings}")
        print(f"no errors, {warnings}")

    def findings(self) -> list[Findings]:
        """What is found in the parts for training and evaluation, and in the part "test" of a data path that has one.

        Raises:
            DataError: if the data are not given, or a file of annotations for training or evaluation cannot be read.
        """
        if self.folder is not None and self.data_path is not None:
            raise DataError("give the folder or data_path, not both")
        given = {each.name: getattr(self, each.name) for each in fields(DataPaths)}
        data = DataPaths(**{**given, "data_path": self.folder or self.data_path})
        queries = self.num_queries or model_config(self.model).num_queries
        findings = [self._check(part, data, queries) for part in ("train", "val")]
        compare_parts(*findings)
        try:
            if data.data_path is not None and has_part(data.data_path, "test"):
                findings.append(self._check("test", data, queries))
                compare_parts(findings[0], findings[-1])
        except DataError as error:  # no training reads this part
            findings.append(Findings("test", checked=False))
            findings[-1].warnings["other"].append(f"test: {error}: not checked")
        return findings

    def _check(self, part: str, data: DataPaths, num_queries: int) -> Findings:
        yolo = None if data.data_path is None else find_yolo(data.data_path)
        if yolo is not None:
            found = read_yolo(yolo, part)
            folder, content, labelled = found.image_folder, found.content, found.labelled
        else:
            paths = {"train": data.train_paths, "val": data.val_paths, "test": data.test_paths}
            folder, annotations = paths[part]()
            content = read_coco(annotations)
            if not folder.is_dir():
                raise DataError(f"image folder {folder} does not exist; give the folder that holds the images")
            labelled = bool(content["annotations"])
        if part == "test" and not labelled:
            raise DataError("without labels")
        findings = check_part(
            part,
            folder,
            content,
            num_queries=num_queries,
            decode=self.decode,
            workers=self.workers,
            progress=lambda items, total: track(items, f"images ({part})", total, console=Console(stderr=True)),
        )
        if yolo is not None:
            findings.errors["yolo"] = found.faults
        elif not any(findings.errors.values()):
            try:  # so that nothing passes that training refuses
                read_annotations(annotations, segmentations=model_config(self.model).predicts_masks)
            except DataError as error:
                findings.errors["other"].append(f"{part}: {error}")
        return findings


def _print_statistics(part: Findings) -> None:
    numbers: Statistics = part.statistics
    print(
        f"{part.name}: {numbers.images} images ({numbers.without_objects} without objects), {numbers.objects} objects, "
        f"{numbers.crowds} crowd regions, {len(numbers.per_category)} categories"
    )
    if numbers.smallest_image and numbers.largest_image:
        sizes = [f"{width} x {height}" for width, height in (numbers.smallest_image, numbers.largest_image)]
        print(f"  images from {sizes[0]} to {sizes[1]} pixels")
    if numbers.turned:
        print(
            f"  {numbers.turned} of them are turned upright by their EXIF orientation, and so must be their annotations"
        )
    if numbers.objects:
        mean = numbers.objects / numbers.images
        small, medium, large = (f"{100 * count / numbers.objects:.0f} %" for count in numbers.sizes)
        fullest = f"{numbers.most_objects} in image {numbers.fullest_image}"
        print(f"  objects per image: {mean:.1f} on average, at most {fullest}")
        print(f"  objects: {small} small (below 32 x 32 pixels), {medium} medium, {large} large (from 96 x 96)")
        counts = (f"{shown(part.categories[number], NAME)} {count}" for number, count in numbers.per_category.items())
        print("  per category: " + ", ".join(counts))


def _print_messages(kind: str, messages: list[str], limit: int) -> None:
    for message in messages[:limit]:
        print(f"{kind}: {shown(message, MESSAGE)}")
    if len(messages) > limit:
        print(f"{kind}: ... and {len(messages) - limit} more like these")
