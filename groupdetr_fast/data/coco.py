"""Data sets in COCO format."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..boxes import xyxy_to_cxcywh
from .annotation_cache import load_annotations
from .annotations import WITHOUT_MASK, Annotations, DataError
from .categories import class_table
from .copy_paste import CopyPaste
from .images import decode_rgb, is_turned, open_image, size_fault
from .rare_classes import repeat_factors
from .sampling import seeded

__all__ = ["CocoDataset", "Transforms"]

Transforms = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]

_LARGEST_LABEL = 99_999  # a model has a class for every number up to the largest category id


class CocoDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images with boxes from a folder and a COCO json file.

    A sample is ``(image, target)``: ``image`` uint8 ``[3, H, W]``, unless ``transforms`` make floats of it, and
    ``target`` a dict with

    - ``labels``: ``[T]`` int64,
    - ``boxes``: ``[T, 4]`` float32, ``cxcywh`` normalised by the size of the transformed image,
    - ``masks``: ``[T, H, W]`` bool, if they are asked for,
    - ``image_id``: the id in the annotation file,
    - ``original_size``: ``[2]`` int64, ``(height, width)`` of the upright image in pixels,
    - ``normalization``: how :class:`Batch` makes a detector's input of the pixels, if the transforms say so.

    ``dataset[index]`` is the sample in epoch 0, ``dataset[epoch, index]`` that of another epoch, as
    :class:`EpochSampler` asks for it. Every random choice of ``transforms`` is a function of seed, epoch and index
    alone, as long as it draws from the CPU generators of torch, numpy or ``random``.

    Crowd regions are never targets; degenerate boxes and those outside their image are dropped with one warning, the
    others are clipped to the image. With masks, so are objects without a segmentation, and, without a warning, those of
    which the transforms leave no pixel. The EXIF orientation of an image is applied; sizes, boxes and masks of the
    annotation file are those of the upright image.

    Args:
        image_folder: where the ``file_name`` entries are looked up.
        annotation_file: COCO json with "images", "annotations" and "categories".
        transforms: a torchvision v2 transform of ``(image, {"boxes", "labels"[, "masks"]})``, which it gets as
            tv_tensors (uint8 and ``xyxy`` pixels). None: the image stays as it is.
        labels: ``"contiguous"``: label = rank of the category among the ascending ids; ``"category_id"``: label =
            category id, as in the original repositories (91 classes for COCO).
        masks: whether samples have masks, made from the polygons or run lengths of the annotations.
        seed: of the transforms; not negative.
        cache_images: decode all images now and keep them in memory as uint8; for small sets.
        copy_paste: pastes objects of another image, after both are transformed; needs the masks of all objects, whether
            samples have masks or not, and decodes those of the two images alone. None to paste nothing.

    Attributes:
        annotation_file: as given.
        masks: whether samples have masks.
        image_ids: ids in the order of the samples.
        categories: the category entries of the file, ordered by label.
        num_objects: of all images; crowd regions and what is dropped do not count.
        num_classes: size of the label space; in mode ``"category_id"`` the largest id plus 1.
        category_ids: ``[num_classes]`` int64, the category id of each label.
        class_names: the name of each label; its number where it is the id of no category.

    Raises:
        DataError: on construction, for a fault in the folder or the annotation file; on access, for an image file
            that is missing, unreadable or of another size than the annotation file says.
        ValueError: for an unknown ``labels`` mode, a negative seed, or ``copy_paste`` without ``transforms``.
        IndexError: for an index out of range.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        transforms: Transforms | None = None,
        *,
        labels: Literal["contiguous", "category_id"] = "contiguous",
        masks: bool = False,
        seed: int = 0,
        cache_images: bool = False,
        copy_paste: CopyPaste | None = None,
    ):
        if labels not in ("contiguous", "category_id"):
            raise ValueError(f'labels must be "contiguous" or "category_id", got {labels!r}')
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if copy_paste is not None and transforms is None:
            raise ValueError("copy_paste pastes into images that are transformed: give transforms")
        self.image_folder = Path(image_folder)
        if not self.image_folder.is_dir():
            raise DataError(f"image folder {image_folder} does not exist; give the folder that holds the images")
        self.annotation_file = Path(annotation_file)
        self.transforms = transforms
        self.seed = seed
        self.masks = masks
        self._annotations = load_annotations(annotation_file, segmentations=masks or copy_paste is not None)
        lost = [each for each in self._annotations.warnings if WITHOUT_MASK in each]
        if lost and not masks:  # a detector of boxes would have had them
            raise DataError(
                f"annotation file {annotation_file}: copy_paste needs the mask of every object, but {lost[0]}: "
                "give them polygons or run lengths, or leave copy_paste at 0"
            )
        self._copy_paste = copy_paste
        self._sources = self._annotations.counts.nonzero().flatten()
        self.image_ids: list[int] = self._annotations.image_ids.tolist()
        self.categories = self._annotations.categories
        self.num_objects = len(self._annotations.boxes)
        self.class_names, self.category_ids, self._labels = _label_space(self._annotations, labels)
        self.num_classes = len(self.category_ids)

        self._cache: dict[int, Tensor] | None = None
        if cache_images:
            self.cache_images()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        normalization = None
        if self.transforms is None:
            image, objects = self.image(index), self.ground_truth(index)
        else:
            with seeded(self.seed, epoch, index):
                image, objects = self._transformed(index)
            image = image.as_subclass(Tensor)
            normalization = objects.pop("normalization", None)
        if "masks" in objects:
            visible = objects["masks"].as_subclass(Tensor).flatten(1).bool().any(1)
            objects = {name: value[visible] for name, value in objects.items()}
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        target: dict[str, Any] = {
            "labels": objects["labels"].as_subclass(Tensor),
            "boxes": xyxy_to_cxcywh(objects["boxes"].as_subclass(Tensor)) / scale,
            "image_id": self.image_ids[index],
            "original_size": torch.from_numpy(self._annotations.image_sizes[index]).clone(),
        }
        if normalization is not None:
            target["normalization"] = normalization
        if "masks" in objects:
            target["masks"] = objects["masks"].as_subclass(Tensor).bool()
        return image, target

    def cache_images(self) -> None:
        """Decode all images now and keep them in memory.

        Raises:
            DataError: for an image that cannot be read.
        """
        self._cache = {index: self._decode(index) for index in range(len(self))}

    def image(self, index: int) -> Tensor:
        """The decoded image, uint8 RGB ``[3, H, W]``, before any transform; not to be modified."""
        self._check(index)
        if self._cache is None:
            return self._decode(index)
        if index not in self._cache:
            self._cache[index] = self._decode(index)
        return self._cache[index]

    def upright(self, index: int, *, masks: bool) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """The image and its objects, perhaps with masks, as ``transforms`` get them; see :class:`CocoDataset`."""
        image, objects = self.image(index), self._objects(index, masks=masks)
        size = (image.shape[1], image.shape[2])
        typed: dict[str, Any] = {
            **objects,
            "boxes": tv_tensors.BoundingBoxes(objects["boxes"], format="XYXY", canvas_size=size),
        }
        if masks:
            typed["masks"] = tv_tensors.Mask(objects["masks"])
        return tv_tensors.Image(image), typed

    def _transformed(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """The transformed image and its objects, perhaps with pasted ones among them."""
        assert self.transforms is not None
        draws = self._copy_paste is not None and self._copy_paste.draws() and len(self._sources) > 0
        paste = self._copy_paste if draws else None
        image, objects = self.transforms(*self.upright(index, masks=self.masks or paste is not None))
        if paste is not None:
            source = int(self._sources[torch.randint(len(self._sources), ())])
            try:
                other = self.upright(source, masks=True)
            except DataError:  # which its own turn says of it, and not that of this image
                pass
            else:
                image, objects = paste(image, objects, *self.transforms(*other))
            if not self.masks:
                del objects["masks"]
        return image, objects

    def outcomes(self, transforms: Sequence[Transforms]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
        """For each image, in order, the samples of epoch 0 that these transforms make of it, which is decoded once."""
        decoded: dict[int, Tensor] = {}
        datasets = [copy.copy(self) for _ in transforms]
        for dataset, each in zip(datasets, transforms, strict=True):
            dataset.transforms, dataset._cache = each, decoded
        for index in range(len(self)):
            yield [dataset[index] for dataset in datasets]
            decoded.clear()

    def ground_truth(self, index: int) -> dict[str, Tensor]:
        """The targets before any transform.

        Returns:
            ``labels [T]`` int64, ``boxes [T, 4]`` float32, ``xyxy`` in pixels, and, if the data set has masks, ``masks
            [T, H, W]`` uint8.
        """
        return self._objects(index, masks=self.masks)

    def _objects(self, index: int, *, masks: bool) -> dict[str, Tensor]:
        self._check(index)
        start, stop = self._annotations.offsets[index : index + 2]
        objects = {"labels": self._labels[start:stop].clone(), "boxes": self._annotations.boxes[start:stop].clone()}
        if masks:
            assert self._annotations.segmentations is not None
            height, width = self._annotations.image_sizes[index].tolist()
            objects["masks"] = self._annotations.segmentations.masks(int(start), int(stop), height, width)
        return objects

    def indices_with_objects(self) -> list[int]:
        """Indices of the images that have an object to train on; crowd regions are none.

        Raises:
            DataError: if there are none.
        """
        counts = self._annotations.counts
        if not counts.any():
            raise DataError(f"annotation file {self.annotation_file} has no image with objects: leave filter_empty off")
        return counts.nonzero().flatten().tolist()

    @property
    def image_sizes(self) -> Tensor:
        """``[len(self), 2]`` int64, (height, width) of the upright images in pixels."""
        return torch.from_numpy(self._annotations.image_sizes)

    def most_objects(self) -> int:
        """Objects of the fullest image."""
        return int(self._annotations.counts.max())

    def objects_of_classes(self) -> Tensor:
        """How many objects each class has, ``[num_classes]`` int64."""
        return torch.bincount(self._labels, minlength=self.num_classes)

    def repeat_factors(self, threshold: float) -> Tensor:
        """How often each image is to come in an epoch, ``[len(self)]`` float64; see ``rare_classes.repeat_factors``."""
        images = torch.arange(len(self)).repeat_interleave(self._annotations.counts)
        return repeat_factors(self._labels, images, len(self), threshold)

    def label_to_category_id(self, label: int | Tensor) -> int | Tensor:
        """The category id of a label, or of every entry of an integer tensor of any shape."""
        if isinstance(label, Tensor):
            return self.category_ids.to(label.device)[label]
        return int(self.category_ids[label])

    def __getstate__(self) -> dict[str, Any]:
        # What a spawned worker gets: sending thousands of small tensors would exhaust its file descriptors.
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")

    def _decode(self, index: int) -> Tensor:
        path = self.image_folder / self._annotations.file_names[index]
        name = f"image file {path} (image id {self.image_ids[index]})"
        height, width = self._annotations.image_sizes[index].tolist()
        try:
            with open_image(path) as file:
                size, turned = file.size, False
                # Of another size nothing is decoded: a small file may hold a huge image.
                if size in ((width, height), (height, width)):
                    turned, pixels = is_turned(file), decode_rgb(file)
                    size = (pixels.shape[2], pixels.shape[1])
                    if size == (width, height):
                        return pixels
        except FileNotFoundError:
            raise DataError(f"{name} does not exist; check the image folder and the annotation file") from None
        except Exception as error:  # decoders raise anything on damaged files
            raise DataError(f"{name} cannot be read ({error}); replace the file or remove its entry") from None
        fault = size_fault(size, (width, height), turned, str(self._annotations.path))
        raise DataError(f"{name} {fault}; correct the file or the entry")


def _label_space(
    annotations: Annotations, labels: Literal["contiguous", "category_id"]
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Name and category id of each label, and the label of each object."""
    if labels == "contiguous":
        names, ids = class_table(annotations.categories, labels)
        category_ids = torch.tensor(ids)
        return names, category_ids, torch.searchsorted(category_ids, annotations.category_ids)
    for category in (annotations.categories[0], annotations.categories[-1]):
        if not 0 <= category["id"] <= _LARGEST_LABEL:
            raise DataError(
                f"annotation file {annotations.path}: category id {category['id']} cannot be a label; use "
                'labels="contiguous"'
            )
    names, ids = class_table(annotations.categories, labels)
    return names, torch.tensor(ids), annotations.category_ids
