"""Checked annotations of large files as arrays on disk: a json of COCO's size takes every process gigabytes to read.

The arrays lie in :func:`~groupdetr_fast.data.cache.cache_root`, in a folder that is named after the SHA-256 of the
json: a json that changes has another one, and equal files share theirs. The first process that needs the arrays makes
them, while others on the machine wait for it. Folders that are not needed any more may be deleted at any time.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from .annotations import Annotations, read_annotations
from .cache import cache_root, made_once
from .segmentations import Segmentations
from .texts import Texts

__all__ = ["WORTH_CACHING", "load_annotations"]

logger = logging.getLogger(__name__)

WORTH_CACHING = 2**24  # bytes of json; smaller files are read in a fraction of a second
_FORMAT = 1  # to be raised with every change to the files or to what is checked
_HASHED_AT_ONCE = 2**22  # bytes


def load_annotations(path: str | Path, *, segmentations: bool = False) -> Annotations:
    """What :func:`read_annotations` reads, and says in the log; of large files from the cache.

    Where the cache cannot be written, the file is read as if it were small.

    Raises:
        DataError: as :func:`read_annotations`.
    """
    path = Path(path)
    annotations = _cached(path, segmentations) if path.is_file() and path.stat().st_size >= WORTH_CACHING else None
    if annotations is None:
        annotations = read_annotations(path, segmentations=segmentations)
    for warning in annotations.warnings:
        logger.warning("%s: %s", path, warning)
    return annotations


def _cached(path: Path, segmentations: bool) -> Annotations | None:
    """The annotations from the cache, which then has them; None if it cannot be used."""
    try:
        digest = _digest(path)
        folder = cache_root() / "annotations" / f"{'masks' if segmentations else 'boxes'}-{_FORMAT}-{digest}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    logger.info("%s: keeping its annotations in %s", path, folder)
                    annotations = read_annotations(path, segmentations=segmentations)
                    if _digest(path) != digest:  # changed while it was read
                        return annotations
                    made_once(folder, partial(_save, annotations))
                    del annotations  # arrays that are shared with other processes take their place
        return _load(path, folder, segmentations)
    except (OSError, NotImplementedError) as error:  # of a lock, on file systems without any
        logger.warning(
            "%s: its annotations cannot be kept in the cache (%s), and are read again each time", path, error
        )
        return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _save(annotations: Annotations, folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "image_ids": annotations.image_ids,
        "image_sizes": annotations.image_sizes,
        "offsets": annotations.offsets,
        "boxes": annotations.boxes.numpy(),
        "category_ids": annotations.category_ids.numpy(),
        "names": annotations.file_names.characters,
        "name_offsets": annotations.file_names.offsets,
    }
    if annotations.segmentations is not None:
        packed = annotations.segmentations
        arrays |= {f"segmentations_{field.name}": getattr(packed, field.name) for field in fields(packed)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    rest = {"categories": annotations.categories, "warnings": annotations.warnings}
    (folder / "rest.json").write_text(json.dumps(rest))


def _load(path: Path, folder: Path, segmentations: bool) -> Annotations | None:
    """The annotations of a folder; None if it is damaged, and then it is gone."""
    try:
        rest: dict[str, Any] = json.loads((folder / "rest.json").read_text())

        def array(name: str, mode: Any = None) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode=mode)

        packed = None
        if segmentations:  # which are as large as the json, and of which an epoch reads a little at a time
            packed = Segmentations(*(array(f"segmentations_{field.name}", "r") for field in fields(Segmentations)))
        return Annotations(
            path=path,
            image_ids=array("image_ids"),
            file_names=Texts(array("names"), array("name_offsets")),
            image_sizes=array("image_sizes"),
            categories=rest["categories"],
            boxes=torch.from_numpy(array("boxes")),
            category_ids=torch.from_numpy(array("category_ids")),
            offsets=array("offsets"),
            segmentations=packed,
            warnings=tuple(rest["warnings"]),
        )
    except (OSError, ValueError, KeyError, EOFError) as error:
        logger.warning("%s: the annotations in %s are damaged (%s), and are made again", path, folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
