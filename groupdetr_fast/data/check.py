"""What is wrong with a data set, all at once: training would stop at the first fault, or drop what it cannot use."""

import hashlib
import math
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .annotations import MEDIUM, SMALL, is_box, is_inside
from .categories import category_differences
from .images import decode_rgb, is_turned, open_image, size_fault, upright_size

__all__ = ["Findings", "Statistics", "check_part", "compare_parts"]

Entry = dict[str, Any]


@dataclass
class Statistics:
    """Numbers of a part of a data set.

    Attributes:
        images: entries of images.
        without_objects: images that no usable annotation is of.
        objects: annotations that training uses.
        crowds: annotations of crowd regions.
        per_category: objects by category id.
        most_objects: largest number of objects in an image.
        fullest_image: id of that image.
        smallest_image, largest_image: (width, height) by area.
        turned: images whose EXIF orientation turns or mirrors the stored pixels.
        sizes: objects that COCO calls small, medium and large, by the area of their boxes.
    """

    images: int = 0
    without_objects: int = 0
    objects: int = 0
    crowds: int = 0
    per_category: dict[int, int] = field(default_factory=dict)
    most_objects: int = 0
    fullest_image: Any = None
    smallest_image: tuple[int, int] | None = None
    largest_image: tuple[int, int] | None = None
    turned: int = 0
    sizes: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Findings:
    """What a check has found.

    Attributes:
        name: of the part, for messages.
        errors: by kind, sentences about what stops a training, or makes it learn something else than is meant.
        warnings: by kind, sentences about what is dropped or deserves a look.
        categories: name of each category id.
        unnamed: the ids of those without one, which is an error of its own.
        statistics: see there.
        digests: of each file that was read, its image ids: equal files have equal digests.
        checked: whether the part could be checked; if not, a warning says why, and there are no statistics.
    """

    name: str
    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    categories: dict[int, str] = field(default_factory=dict)
    unnamed: set[int] = field(default_factory=set)
    statistics: Statistics = field(default_factory=Statistics)
    digests: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    checked: bool = True


def check_part(
    name: str,
    image_folder: Path,
    content: dict[str, Any],
    *,
    num_queries: int | None = None,
    decode: bool = True,
    workers: int = 2,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Findings:
    """Check the images and annotations of one part of a data set.

    Args:
        name: of the part, for messages.
        image_folder: that the file names are relative to.
        content: of a COCO json, as ``annotations.read_coco`` returns it.
        num_queries: N, queries of one group, to compare the number of objects with; None for no comparison.
        decode: whether to decode every image; without, only its header is read, and the files are not compared.
        workers: threads that read images.
        progress: wraps the images, whose number is its second argument, to show how far the check is.
    """
    findings = Findings(name)
    images = _unique(content["images"], "image", findings)
    categories = _unique(content["categories"], "category", findings)
    annotations = _unique(content["annotations"], "annotation", findings)
    findings.categories = {number: str(entry.get("name", number)) for number, entry in categories.items()}
    findings.unnamed = {number for number, entry in categories.items() if "name" not in entry}
    for table, entries in (("images", images), ("categories", categories)):
        if not entries:
            findings.errors["empty"].append(f"{name}: there are no {table}")
    kept = [entry for entry in annotations.values() if _is_usable(entry, images, categories, findings)]
    _count(images, annotations, kept, num_queries, findings)
    _check_names(categories, findings)
    _check_images(image_folder, images, decode, workers, progress, findings)
    return findings


def compare_parts(train: Findings, val: Findings) -> None:
    """Add to ``val`` errors about categories in which the parts differ, and warnings about images that both have."""
    for each in category_differences(train.categories, val.categories):
        if None in each or each.number not in train.unnamed | val.unnamed:
            val.errors["categories"].append(each.told(train.name, val.name))
    for digest in train.digests.keys() & val.digests.keys():
        theirs, ours = train.digests[digest][0], val.digests[digest][0]
        val.warnings["leak"].append(f"image {ours} of {val.name} is the same file as image {theirs} of {train.name}")
    val.warnings["leak"].sort()


def _unique(entries: Sequence[Entry], kind: str, findings: Findings) -> dict[Any, Entry]:
    """The entries by id; the first of those with one id."""
    by_id: dict[Any, Entry] = {}
    for index, entry in enumerate(entries):
        number = entry.get("id")
        if type(number) is not int:
            findings.errors["id"].append(f"{findings.name}: {kind} entry {index} has the id {number!r}, not an integer")
        elif number in by_id:
            findings.errors["duplicate"].append(
                f"{findings.name}: the id {number} occurs more than once among the {kind} entries"
            )
        else:
            by_id[number] = entry
    return by_id


def _check_names(categories: dict[int, Entry], findings: Findings) -> None:
    by_name: dict[str, list[int]] = defaultdict(list)
    for number, entry in categories.items():
        if isinstance(entry.get("name"), str):
            by_name[entry["name"]].append(number)
    for name, numbers in by_name.items():
        if len(numbers) > 1:
            # Exports repeat the name of a super-category that has no objects; else one class would be learned as two.
            used = sum(findings.statistics.per_category[number] > 0 for number in numbers)
            (findings.errors if used > 1 else findings.warnings)["name"].append(
                f"{findings.name}: categories {', '.join(map(str, numbers))} have the same name {name}"
            )


def _check_images(
    folder: Path,
    images: dict[int, Entry],
    decode: bool,
    workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
    findings: Findings,
) -> None:
    owners: dict[str, int] = {}
    for image_id, image in images.items():
        file_name = str(image.get("file_name"))
        if file_name in owners:
            first = owners[file_name]
            findings.warnings["file"].append(
                f"{findings.name}: images {first} and {image_id} are the same file {file_name}"
            )
        owners.setdefault(file_name, image_id)
    with ThreadPoolExecutor(workers) as pool:
        read = pool.map(partial(_read, folder, decode), images.values())
        for (image_id, image), file in progress(zip(images.items(), read, strict=True), len(images)):
            if isinstance(file, str):
                findings.errors["image"].append(f"{findings.name}: image {image_id}: {file}")
                continue
            findings.statistics.turned += file.turned
            stated = (image.get("width"), image.get("height"))
            if fault := size_fault(file.size, stated, file.turned, "its entry"):
                findings.errors["size"].append(f"{findings.name}: image {image_id}: {image['file_name']} {fault}")
            if file.digest is not None:
                findings.digests[file.digest].append(image_id)


@dataclass(frozen=True)
class _ImageFile:
    size: tuple[int, int]  # (width, height), upright
    turned: bool
    digest: str | None


def _read(folder: Path, decode: bool, image: Entry) -> _ImageFile | str:
    """The file of an image, or what is wrong with it."""
    name = image.get("file_name")
    if not is_inside(name):
        return f"the file name {reprlib.repr(name)} is no path inside the image folder"
    path = folder / name
    if not path.is_file():
        return f"{path} does not exist"
    try:
        with open_image(path) as file:
            size, turned = upright_size(file), is_turned(file)
            if decode:
                decode_rgb(file)
        return _ImageFile(size, turned, hashlib.sha256(path.read_bytes()).hexdigest() if decode else None)
    except Exception as error:  # decoders raise anything on damaged files
        return f"{path} cannot be read ({error})"


def _is_usable(entry: Entry, images: dict[int, Entry], categories: dict[int, Entry], findings: Findings) -> bool:
    """Whether training can use an annotation; if not, or not as it is, say why."""
    who = f"{findings.name}: annotation {entry['id']}"
    known = True
    for key, table in (("image_id", images), ("category_id", categories)):
        if type(entry.get(key)) is not int or entry[key] not in table:
            findings.errors[key].append(f"{who} has the {key} {entry.get(key)!r}, which is not in the table")
            known = False
    box: Any = entry.get("bbox")
    if not is_box(box):
        findings.errors["bbox"].append(f"{who} has the bbox {reprlib.repr(box)}, which is not x, y, width, height")
        return False
    x, y, width, height = box
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0:
        findings.warnings["degenerate"].append(f"{who} has the empty bbox {box} and is dropped")
        return False
    if not known:
        return False
    limits: list[Any] = [images[entry["image_id"]].get(key) for key in ("width", "height")]
    if not all(type(limit) is int for limit in limits):
        return False  # an error of the image
    if x >= limits[0] or y >= limits[1] or x + width <= 0 or y + height <= 0:
        findings.warnings["outside"].append(f"{who} lies outside its image {entry['image_id']} and is dropped")
        return False
    if x < -1 or y < -1 or x + width > limits[0] + 1 or y + height > limits[1] + 1:
        findings.warnings["beyond"].append(f"{who} reaches beyond its image {entry['image_id']} and is clipped")
    return True


def _count(
    images: dict[int, Entry],
    annotations: dict[int, Entry],
    kept: Sequence[Entry],
    num_queries: int | None,
    findings: Findings,
) -> None:
    """Fill in the statistics, and warn about what they show."""
    objects = [entry for entry in kept if not entry.get("iscrowd", 0)]
    per_category = Counter(entry["category_id"] for entry in objects)
    per_image = Counter(entry["image_id"] for entry in objects)
    areas = [entry["bbox"][2] * entry["bbox"][3] for entry in objects]
    stated: list[Any] = [(image.get("width"), image.get("height")) for image in images.values()]
    shapes = [shape for shape in stated if type(shape[0]) is type(shape[1]) is int]
    fullest, most = next(iter(per_image.most_common(1)), (None, 0))
    findings.statistics = Statistics(
        images=len(images),
        without_objects=len(images) - len(per_image),
        objects=len(objects),
        crowds=sum(bool(entry.get("iscrowd", 0)) for entry in annotations.values()),
        per_category={number: per_category[number] for number in sorted(findings.categories)},
        most_objects=most,
        fullest_image=fullest,
        smallest_image=min(shapes, key=math.prod, default=None),
        largest_image=max(shapes, key=math.prod, default=None),
        sizes=(
            sum(area < SMALL for area in areas),
            sum(SMALL <= area < MEDIUM for area in areas),
            sum(area >= MEDIUM for area in areas),
        ),
    )
    if images and not objects:
        findings.errors["empty"].append(f"{findings.name}: no image has an object that can be used")
    for number, name in findings.categories.items():
        if not per_category[number]:
            findings.warnings["class"].append(f"{findings.name}: category {number} ({name}) has no objects")
    for image_id, count in sorted(per_image.items()):
        if num_queries is not None and count > num_queries:
            findings.warnings["queries"].append(
                f"{findings.name}: image {image_id} has {count} objects, and a group has {num_queries} queries: "
                f"{count - num_queries} of them stay unmatched"
            )
