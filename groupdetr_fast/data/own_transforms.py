"""Augmentations of one's own, from a file of Python that a configuration names."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .annotations import DataError
from .sampling import seeded

if TYPE_CHECKING:
    from .coco import CocoDataset

__all__ = ["OwnTransforms", "TransformError", "split_name", "try_on_samples"]

EXAMPLE = "my_transforms.py:build"
SAMPLES = 8  # images, from all over the data set, on which a transform is tried
SHOWN = 200  # characters of another program's error


class TransformError(ValueError):
    """A fault of a transform, in one sentence that names its file."""

    def __init__(self, message: str):
        # As of DataError: from a process that loads images, our sentence comes at the end of a traceback.
        super().__init__(message.rpartition("TransformError: ")[2].strip())


class OwnTransforms:
    """The transform that a function in a file returns, checked at every call.

    The file is run here, and once more in every process that loads images: the transform itself need not be one that
    can be sent to another process. The function is called without arguments, and what it draws at random is the same
    everywhere.

    Args:
        name: ``FILE.py:FUNCTION``; the function returns a ``torchvision.transforms.v2`` transform.

    Attributes:
        name: as given.
        source: the text of the file.

    Raises:
        TransformError: if the file or the function does not exist, one of them fails, or the function returns something
            else; the sentence names the file.
    """

    def __init__(self, name: str):
        path, _ = split_name(name)
        try:
            source = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise TransformError(f"transforms: {path} cannot be read ({reason}): give {EXAMPLE}") from None
        self._build(name, source)

    def _build(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        path, function = split_name(name)
        names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        with _failures_explained(str(path), path):
            exec(compile(source, str(path), "exec"), names)
        build = names.get(function)
        if not callable(build):
            own = [value for value in names.values() if isinstance(value, FunctionType)]
            functions = [value.__name__ for value in own if value.__code__.co_filename == str(path)]
            has = f"it has {', '.join(functions)}" if functions else "it has none"
            raise TransformError(f"transforms: {path} has no function {function}: {has}")
        with seeded(0, 0, 0), _failures_explained(f"{function}() of {path}", path):
            transform = build()
        if not isinstance(transform, v2.Transform):
            raise TransformError(
                f"transforms: {function}() of {path} must return a transform of torchvision.transforms.v2, got "
                f"{_kind(transform)}"
            )
        self._transform: Callable[..., Any] = transform

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(**state)

    def __call__(self, image: Any, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Transform an image and its objects.

        Boxes are clipped to the image afterwards, and objects are removed whose box has no pixel left in it.

        Args:
            image: ``tv_tensors.Image`` uint8 ``[3, H, W]``; the transform gets a copy.
            objects: ``boxes`` as ``tv_tensors.BoundingBoxes [T, 4]`` xyxy float32, ``labels [T]`` int64, and perhaps
                ``masks`` as ``tv_tensors.Mask [T, H, W]``.

        Returns:
            The same kinds.

        Raises:
            TransformError: if the transform fails, or returns other kinds, types or numbers; it names the file.
        """
        with _failures_explained(f"the transform of {self.name}", split_name(self.name)[0]):
            result = self._transform(tv_tensors.wrap(image.clone(), like=image), dict(objects))
        fault = _fault(result, objects)
        if fault is not None:
            raise TransformError(f"transforms: the transform of {self.name} {fault}")
        return _sanitized(*result)


def try_on_samples(transforms: OwnTransforms, dataset: "CocoDataset") -> None:
    """Call a transform for a few images with objects, so that a training does not fail by it hours later.

    Args:
        transforms: what is tried.
        dataset: where the images are from; those that cannot be read are passed over.

    Raises:
        TransformError: as a call raises it, and if no object of any of the images is left.
    """
    indices = dataset.indices_with_objects()
    tried, before, after = 0, 0, 0
    for index in indices[:: max(1, len(indices) // SAMPLES)][:SAMPLES]:
        try:
            image, objects = dataset.upright(index, masks=dataset.masks)
        except DataError:
            continue
        with seeded(dataset.seed, 0, index):
            _, left = transforms(image, objects)
        tried, before, after = tried + 1, before + len(objects["labels"]), after + len(left["labels"])
    if tried and not after:
        raise TransformError(
            f"transforms: the transform of {transforms.name} leaves none of the {before} objects of {tried} images: "
            "their boxes are outside the images or smaller than a pixel afterwards"
        )


def split_name(name: str) -> tuple[Path, str]:
    """File and function of ``FILE.py:FUNCTION``.

    Raises:
        TransformError: if one of them is missing.
    """
    file, _, function = name.rpartition(":")
    if not file or not function.isidentifier():
        raise TransformError(f"transforms must be FILE.py:FUNCTION, such as {EXAMPLE}, got {name!r}")
    return Path(file), function


@contextmanager
def _failures_explained(what: str, path: Path) -> Iterator[None]:
    """Turn any error of somebody else's code into a sentence with its place in the file ``path``."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        place = f", line {lines[-1]}" if lines else ""
        reason = " ".join(str(error).split())[:SHOWN]
        raise TransformError(f"transforms: {what} fails{place}: {type(error).__name__}: {reason}") from None


def _fault(result: Any, given: dict[str, Any]) -> str | None:
    """What is wrong with what a transform returned; the sentence continues after its name."""
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], dict)):
        return f"must return the image and the dictionary of objects that it is called with, got {_kind(result)}"
    image, objects = result
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        return f"must return an image [3, H, W], got {_kind(image)}"
    if image.dtype != torch.uint8:
        return (
            f"must return the image as uint8, got {image.dtype}: leave ToDtype and Normalize out, since images are "
            "normalised on the device (image_mean, image_std)"
        )
    for key in given:
        if not isinstance(objects.get(key), Tensor):
            return f"must keep {key!r} in the dictionary, got {_kind(objects.get(key))}"
    boxes, labels, size = objects["boxes"], objects["labels"], tuple(image.shape[1:])
    if not isinstance(boxes, tv_tensors.BoundingBoxes) or boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
        form = f" as {boxes.format.name}" if isinstance(boxes, tv_tensors.BoundingBoxes) else ""
        return f"must keep the boxes as tv_tensors.BoundingBoxes in XYXY, got {_kind(boxes)}{form}"
    if tuple(boxes.canvas_size) != size:
        return f"returns an image of {size} pixels and boxes of one of {tuple(boxes.canvas_size)}: transform both"
    if not boxes.is_floating_point() or not bool(boxes.isfinite().all()):
        return "must return boxes that are finite numbers"
    if labels.dtype != torch.int64:
        return f"must keep the labels int64, got {labels.dtype}"
    numbers = {key: len(objects[key]) for key in given}
    if len(set(numbers.values())) > 1 or boxes.shape != (len(labels), 4):
        return f"returns different numbers of objects: {', '.join(f'{n} {key}' for key, n in numbers.items())}"
    masks = objects["masks"] if "masks" in given else None
    if masks is not None and (not isinstance(masks, tv_tensors.Mask) or tuple(masks.shape[1:]) != size):
        return f"must keep the masks as tv_tensors.Mask [T, {size[0]}, {size[1]}], got {_kind(masks)}"
    return None


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _sanitized(image: Tensor, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """With boxes inside the image, and without the objects of which no pixel is left."""
    boxes = v2.functional.clamp_bounding_boxes(objects["boxes"])
    plain = boxes.as_subclass(Tensor)
    kept = (plain[:, 2:] - plain[:, :2] >= 1).all(1)
    objects = {**objects, "boxes": tv_tensors.wrap(plain.float(), like=boxes)}
    kept_objects = {
        key: tv_tensors.wrap(value[kept], like=value) if isinstance(value, tv_tensors.TVTensor) else value[kept]
        for key, value in objects.items()
        if key in ("boxes", "labels", "masks")
    }
    return image if isinstance(image, tv_tensors.Image) else tv_tensors.Image(image), kept_objects
