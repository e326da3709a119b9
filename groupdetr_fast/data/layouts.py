"""Data sets recognised from their folder."""

from collections.abc import Callable
from pathlib import Path

from .annotations import DataError
from .yolo import has_images, yolo_as_coco

__all__ = ["find_data", "find_yolo", "has_part"]

_ROBOFLOW = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_YOLO = ("data.yaml", "data.yml", "dataset.yaml")


def find_data(folder: str | Path, part: str) -> tuple[Path, Path]:
    """Where the images and annotations of a data set are. Known are

    - COCO: ``annotations/instances_train2017.json`` and ``train2017/``, also without the year, with the images in
      ``images/train2017/`` or ``images/``, or with ``annotations/train.json``;
    - Roboflow's COCO export: ``train/_annotations.coco.json``, with the images beside it, ``valid/`` or ``val/``, and
      ``test/``;
    - YOLO: ``data.yaml``, see ``data.yolo``.

    Args:
        folder: of the data set; of one in YOLO's layout also the path of ``data.yaml``.
        part: "train", "val" or "test".

    Returns:
        The folder that the file names are relative to, and a COCO json, which is in the cache for YOLO's layout.

    Raises:
        DataError: if there is none, or none of a known layout, or what there is has a fault.
    """
    yolo = find_yolo(folder)
    if yolo is not None:
        return yolo_as_coco(yolo, part)
    if found := _find(Path(folder), part):
        return found
    raise DataError(
        f"{folder} has no {part} part in a known layout: annotations/instances_{part}*.json (COCO), "
        f"{_ROBOFLOW[part][0]}/_annotations.coco.json (Roboflow's COCO export) or data.yaml (YOLO)"
    )


def has_part(folder: str | Path, part: str) -> bool:
    """Whether a data set has a part. One that ``data.yaml`` names counts only if any of its images is there.

    Exports without a part may name its folder, and a list may name images that were not downloaded.

    Raises:
        DataError: as :func:`find_data`, but for a part that is not there.
    """
    yolo = find_yolo(folder)
    return has_images(yolo, part) if yolo is not None else _find(Path(folder), part) is not None


def find_yolo(folder: str | Path) -> Path | None:
    """The ``data.yaml`` of a folder in YOLO's layout, or of its own path; None for other layouts.

    Raises:
        DataError: if the folder does not exist, or is another file.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        return folder
    if folder.is_file():
        raise DataError(f"{folder} is a file: give the folder of the data set, or its data.yaml")
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist")
    if (folder / "annotations").is_dir():
        return None
    return next((folder / name for name in _YOLO if (folder / name).is_file()), None)


def _find(folder: Path, part: str) -> tuple[Path, Path] | None:
    finders: tuple[Callable[[Path, str], tuple[Path, Path] | None], ...] = (_find_coco, _find_roboflow)
    return next(filter(None, (find(folder, part) for find in finders)), None)


def _find_coco(folder: Path, part: str) -> tuple[Path, Path] | None:
    annotations = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
    annotations = annotations or sorted((folder / "annotations").glob(f"{part}.json"))
    if not annotations:
        return None
    if len(annotations) > 1:
        names = ", ".join(path.name for path in annotations)
        raise DataError(f"{folder / 'annotations'} has several files for {part} ({names}): name images and annotations")
    name = annotations[0].stem.removeprefix("instances_")
    for images in (folder / name, folder / "images" / name, folder / part, folder / "images"):
        if images.is_dir():
            return images, annotations[0]
    raise DataError(f"{folder} has {annotations[0].name}, but no folder {name} or images with the images")


def _find_roboflow(folder: Path, part: str) -> tuple[Path, Path] | None:
    for name in _ROBOFLOW[part]:
        annotations = folder / name / "_annotations.coco.json"
        if annotations.is_file():
            return annotations.parent, annotations
    return None
