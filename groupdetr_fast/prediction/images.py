"""From images to named detections."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from ..data import collate, eval_transforms
from ..data.images import IMAGE_LIKE, ChannelOrder, ImageLike, as_rgb
from ..data.videos import VIDEO_SUFFIXES
from ..models import postprocess
from ..models.detector import in_eval_mode
from .batches import batches_by_size, default_workers, read_ahead
from .options import Options, PredictOptions
from .selection import Selection
from .settings import settings_of
from .tiles import Place, Tiling

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Found", "Predictor", "is_path", "predict"]

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True)
class Found(Generic[E]):
    """What is detected in an image.

    Attributes:
        index: of the image among those that were given.
        extra: what came with its pixels.
        detection: as :func:`predict` returns it.
    """

    index: int
    extra: E
    detection: dict[str, Any]


@dataclass(frozen=True)
class _View:
    """An image, or a tile of one, as a detector sees it but for the normalisation."""

    image: Tensor  # uint8 [3, h, w]
    target: dict[str, Any]
    place: Place
    source: "_Image"

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]


class _Image:
    """An image of which detections are collected, until those of all its tiles are there."""

    def __init__(self, index: int, extra: Any, height: int, width: int, places: Sequence[Place]):
        self.index, self.extra, self.height, self.width, self.places = index, extra, height, width, places
        self.found: list[tuple[Place, dict[str, Tensor]]] = []

    def add(self, place: Place, detection: dict[str, Tensor], tiling: Tiling | None) -> dict[str, Tensor] | None:
        """The detections of the image, once they are complete."""
        self.found.append((place, detection))
        if len(self.found) < len(self.places):
            return None
        if tiling is None:
            return detection
        self.found.sort(key=lambda each: self.places.index(each[0]))  # as batches have mixed them
        return tiling.join(self.found, self.height, self.width)


class Predictor:
    """A model with all that is to be done with images.

    Args:
        model: a detector.
        options: what is to be done.
        workers: as of :func:`predict`.

    Raises:
        TypeError: if the model is no module.
        ValueError: for a class that there is not, a threshold that no score can have, and a negative ``workers``.
    """

    def __init__(self, model: nn.Module, options: Options, *, workers: int | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a detector, as gd.load_model(path) gives it, got a {type(model).__name__}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self.model, self.options = model, options
        self.settings = settings_of(model) if options.settings is None else options.settings
        self.tiling = options.tiling()
        num_classes = getattr(getattr(model, "config", None), "num_classes", None)
        self.selection = Selection.of(
            self.settings, num_classes, options.score_threshold, options.classes, options.class_thresholds
        )
        self.workers = default_workers() if workers is None else workers
        self._transform = eval_transforms(self.settings.augmentation)
        self._threshold: float | Tensor | None = None  # known with the first output

    def detect(
        self,
        items: Iterable[T],
        read: Callable[[T], tuple[Tensor, E] | None],
        *,
        in_thread: Callable[[T], bool],
        ordered: bool = False,
        workers: int | None = None,
        batch_size: int | None = None,
    ) -> Generator[Found[E], None, None]:
        """Detect objects in images, which may come out in another order.

        Args:
            items: what the images are read from.
            read: pixels ``[3, H, W]`` uint8 RGB of an item, and anything that is to come with its detections; None to
                leave it out. An error ends the iteration.
            in_thread: which items are read ahead by threads.
            ordered: keep the order.
            workers: in place of those of the predictor.
            batch_size: in place of that of the options.
        """
        tiled = self.tiling is not None
        workers = self.workers if workers is None else workers
        batch_size = self.options.batch_size if batch_size is None else batch_size

        def load(index: int, item: T) -> Iterable[_View]:
            loaded = read(item)
            if loaded is None:
                return ()
            views = self._views(index, *loaded)
            return views if tiled else list(views)  # tiles are cut when their turn comes, a whole image is reduced now

        loaded = read_ahead(
            items,
            load,
            workers=workers,
            ahead=2 if tiled else max(batch_size, 2 * workers),
            in_thread=in_thread,
        )
        for batch in batches_by_size(chain.from_iterable(loaded), batch_size, ordered=ordered):
            for view, detection in zip(batch, self._detect_batch(batch), strict=True):
                complete = view.source.add(view.place, detection, self.tiling)
                if complete is not None:
                    yield Found(view.source.index, view.source.extra, self._named(complete))

    def _views(self, index: int, pixels: Tensor, extra: Any) -> Iterator[_View]:
        height, width = pixels.shape[-2:]
        places = [Place(0, 0, height, width)] if self.tiling is None else self.tiling.places(height, width)
        image = _Image(index, extra, height, width, places)
        for place in places:
            yield self._view(image, pixels, place)

    def _view(self, image: _Image, pixels: Tensor, place: Place) -> _View:
        """A part of an image as ``CocoDataset`` gives images, without objects."""
        if len(image.places) > 1:
            rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
            # Colours stay innermost in memory, as decoders write them: so they are resized faster.
            pixels = pixels.permute(1, 2, 0)[rows, columns].contiguous().permute(2, 0, 1)
        reduced, said = self._transform(tv_tensors.Image(pixels), {})
        target = {
            **said,
            "labels": torch.empty(0, dtype=torch.int64),
            "boxes": torch.empty(0, 4),
            "image_id": 0,
            "original_size": torch.tensor(pixels.shape[-2:]),
        }
        return _View(reduced.as_subclass(Tensor), target, place, image)

    @torch.no_grad()
    def _detect_batch(self, views: Sequence[_View]) -> list[dict[str, Tensor]]:
        """Detections on the CPU; of boxes the host waits for the device once, when it takes them."""
        batch = collate([(view.image, view.target) for view in views])
        device = next(self.model.parameters()).device
        images, masks = batch.images, batch.masks
        if device.type == "cuda":  # so that the copies need not be waited for
            images, masks = images.pin_memory(), masks.pin_memory()
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with in_eval_mode(self.model):
            output = self.model(batch.normalization(images, masks), masks)
        if self._threshold is None:
            self._threshold = self.selection.for_postprocess(output.num_classes)
            if isinstance(self._threshold, Tensor):
                self._threshold = self._threshold.to(device)
        return postprocess(
            output, batch.original_sizes, top_k=self.options.top_k, score_threshold=self._threshold, device="cpu"
        )

    def _named(self, detection: dict[str, Tensor]) -> dict[str, Any]:
        return {**detection, "class_names": [self.settings.name(label) for label in detection["labels"].tolist()]}


def is_path(item: object) -> bool:
    """Whether an image is yet to be read from a file."""
    return isinstance(item, (str, os.PathLike))


def predict(
    model: nn.Module,
    images: ImageLike | Iterable[ImageLike],
    *,
    channel_order: ChannelOrder = "rgb",
    workers: int | None = None,
    **options: "Unpack[PredictOptions]",
) -> dict[str, Any] | list[dict[str, Any]]:
    """Detect objects in images.

    The model runs in eval mode, and is afterwards as it was. Files are read ahead by threads, and images are kept only
    as the model sees them; those of similar size share a batch.

    Args:
        model: a detector, as :func:`load_model` or ``build_model`` make it, on any device.
        images: one image or several: paths, PIL images, arrays ``[H, W(, C)]`` or tensors ``[(C, )H, W]`` of uint8 or
            of floats in [0, 1]; grey, RGB or RGBA. Arrays and tensors must have their colours in this order, which is
            not that of ``cv2.imread``: see ``channel_order``. The EXIF orientation of files and PIL images is applied.
        channel_order: "bgr" for arrays and tensors whose colours are blue, green, red, as OpenCV reads them.
        workers: threads that read files ahead; 0 to read each when it is needed; None for what the machine has cores
            for, at most 8.
        **options: ``score_threshold=0.3``, ``classes=None``, ``class_thresholds=None``, ``top_k=100``,
            ``batch_size=4``, ``tile=None`` and what belongs to it, ``settings=None``: see :class:`Options`.

    Returns:
        A dictionary for one image, a list of them for several, with tensors on the CPU: ``"scores" [k]``, descending;
        ``"labels" [k]`` int64; ``"class_names"``, a list of k strings; ``"boxes" [k, 4]`` xyxy in pixels of the image
        that was given, the right way up; of a model that predicts masks also ``"masks" [k, H, W]`` bool.

    Raises:
        DataError: for an image file that cannot be read.
        TypeError, ValueError: for anything else that is no image, for a ``batch_size`` or ``top_k`` below 1, a
            threshold outside [0, 1], a class that there is not, a setting that makes no tiles, a negative ``workers``,
            and another ``channel_order``.
    """
    predictor = Predictor(model, Options(**options), workers=workers)
    several = isinstance(images, Iterable) and not isinstance(images, (*IMAGE_LIKE, bytes, bytearray))
    single = not several and not (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)
    given = cast(Iterable[ImageLike], [images] if single else images)

    def read(image: ImageLike) -> tuple[Tensor, None]:
        if is_path(image) and Path(cast(Any, image)).suffix.lower() in VIDEO_SUFFIXES:
            raise ValueError(f"{image} is a video: predict_video goes through its frames")
        return as_rgb(image, channel_order=channel_order), None

    found = {each.index: each.detection for each in predictor.detect(given, read, in_thread=is_path)}
    detections = [found[index] for index in sorted(found)]
    return detections[0] if single else detections
