"""The command ``groupdetr predict``, put together."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...data import DataError
from ...data.annotations import read_coco
from ...data.videos import FrameChoice, Video, is_stream, require_video
from ...evaluation.visualize import CELL_PIXELS, PICTURE_PIXELS
from ...prediction import InferenceSettings, load_model, settings_of
from ...prediction.images import Predictor
from ...prediction.options import Options
from ...prediction.video import detect_frames
from ...training.host_memory import keep_freed_memory
from ..flags import CheckpointArgument, DetectorFlags, ImageFlags, require_checkpoint
from .images import JSON, PICTURES, SHEET, ImageReader, ImageResults
from .progress import Bar
from .sources import Sources, find_sources, unlike_each_other
from .videos import VIDEOS, FrameFormat, VideoResults, stem_of

__all__ = ["PredictCommand"]

MOST_THUMBNAILS = 200  # beyond which a picture is too large to look at


@dataclass(frozen=True, kw_only=True)
class PredictCommand(Options):
    """Detect objects in images and videos.

    Of images, ``predictions.json`` is written (a COCO file: images, categories, and detections with scores as
    annotations), each image with its detections into ``images/``, and the first of them together into
    ``contact_sheet.png``. Of each video, the frames with their detections are written as a video into ``videos/``, and
    the detections beside it. What cannot be read is named, and the rest done. Ctrl-C ends with files of what was done.

    Attributes:
        checkpoint: file or folder of this package, such as that of a run, of an original repository or transformers;
            or transformers:DIR_OR_ID, for a model of transformers in a directory or on the hub.
        images: files, folders (the images and videos directly in them) and patterns such as "photos/**/*.jpg"; the
            number of a camera; the address of a stream, such as rtsp://HOST/PATH.
        output: folder to write into.
        categories: COCO json whose categories name the classes, for checkpoints that do not.
        labels: with categories: what the class numbers of the checkpoint are, see docs/training.md.
        classes: what to detect, such as person,car: names of classes, or their numbers; all without it. Given more than
            once, each is one name, which may have a comma in it: --classes "bus, red" --classes car.
        class_thresholds: for some classes a score in place of score_threshold, such as person=0.3,car=0.5; or a json or
            yaml file, such as the class_thresholds.json of an evaluation.
        every: of videos, every so many frames.
        fps: of videos, at most so many frames of a second; in place of every.
        max_frames: of each video, at most so many frames.
        frame_format: detections in videos as json lines, a line for each frame, or as a COCO file.
        workers: threads that read images ahead; None for what the machine has cores for, at most 8.
        device: such as cpu or cuda:1; None for a GPU if there is one.
        accelerate_kernels: let a model of transformers compute with the kernels of this package.
        contact_sheet: images in ``contact_sheet.png``, at most 200; 0 for none.
        annotated: whether to write each image, and each video, with its detections.
    """

    checkpoint: CheckpointArgument = None
    images: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGES")]] = ()
    output: Path = Path("runs/predict")
    categories: Path | None = None
    labels: Literal["contiguous", "category_id"] = "category_id"
    classes: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    class_thresholds: str | None = None
    every: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    frame_format: FrameFormat = "jsonl"
    workers: int | None = None
    device: str | None = None
    accelerate_kernels: bool = True
    contact_sheet: int = 24
    annotated: bool = True
    input: ImageFlags = field(default_factory=ImageFlags)
    detector: DetectorFlags = field(default_factory=DetectorFlags)
    settings: tyro.conf.Suppress[InferenceSettings | None] = None

    def __call__(self) -> None:
        if not 0 <= self.contact_sheet <= MOST_THUMBNAILS:
            raise ValueError(f"contact_sheet must be 0 to {MOST_THUMBNAILS}, got {self.contact_sheet}")
        self._frame_choice()
        checkpoint = require_checkpoint(self.checkpoint, "groupdetr predict CHECKPOINT IMAGES")
        sources = find_sources(self.images, besides=self.output)
        if not sources.exist:
            raise DataError(f"there is nothing at {sources}")
        self._spare(sources)
        if sources.videos:
            require_video()
        model = load_model(
            checkpoint,
            device=self.device,
            accelerate_kernels=self.accelerate_kernels,
            **self.detector.given(),
        )
        if next(model.parameters()).device.type == "cpu":
            keep_freed_memory()  # large maps of every image would be zeroed by the system first
        predictor = Predictor(model, self._options(settings_of(model)), workers=self.workers)
        faults = [self._images(predictor, sources.images)] if sources.images else []
        for video, stem in zip(sources.videos, unlike_each_other(map(stem_of, sources.videos)), strict=True):
            faults.append(self._video(predictor, video, stem))
        if any(faults):
            raise DataError("; ".join(filter(None, faults)))

    def _spare(self, sources: Sources) -> None:
        """Refuse what results would replace."""
        folders = {(self.output / name).resolve() for name in (PICTURES, VIDEOS)}
        files = {(self.output / name).resolve() for name in (JSON, SHEET)}
        for path in sources.files:
            # A link counts as both: it would be replaced where it lies, and its file be written to.
            if path.resolve() in files or folders & {path.resolve().parent, path.parent.resolve()}:
                raise DataError(f"{path} lies where results are written: give another output than {self.output}")

    def _frame_choice(self) -> FrameChoice:
        return FrameChoice(self.every, self.fps, self.max_frames)

    def _images(self, predictor: Predictor, paths: Sequence[Path]) -> str | None:
        """Detect in images. Returns what is to be said of those that cannot be read."""
        read = ImageReader(PICTURE_PIXELS if self.annotated else CELL_PIXELS if self.contact_sheet else None)
        results = ImageResults(
            self.output,
            paths,
            predictor.settings,
            least=predictor.selection.least,
            contact_sheet=self.contact_sheet,
            annotated=self.annotated,
        )
        with (
            closing(predictor.detect(paths, read, in_thread=lambda _: True)) as detected,
            Bar("images", len(paths)) as bar,
        ):
            try:
                for found in detected:
                    results.add(found.index, found.extra, found.detection)
                    bar.advance()
            finally:  # after Ctrl-C and any error, too
                results.finish()
        return read.fault(paths)

    def _video(self, predictor: Predictor, source: str, stem: str) -> str | None:
        """Detect in a video. Returns what is to be said of frames that cannot be read."""
        choice = self._frame_choice()
        try:
            video = Video(source)
        except DataError as error:
            return str(error)
        with video:
            rate = video.rate if self.fps is None or video.rate is None else min(self.fps, video.rate)
            results = VideoResults(
                self.output / VIDEOS,
                stem,
                video,
                predictor.settings,
                form=self.frame_format,
                annotated=self.annotated,
                rate=rate if rate is None or self.every is None else rate / self.every,
            )
            expected = choice.expected(video.length, video.rate)
            try:
                with (
                    closing(detect_frames(predictor, video, choice)) as detected,
                    Bar("frames" if is_stream(source) else f"frames of {stem}", expected) as bar,
                ):
                    for frame, detection in detected:
                        results.add(frame, detection)
                        bar.advance()
            finally:  # after Ctrl-C and any error, too
                results.finish()
            return f"video {video.name}: {video.damage}; the rest is done" if video.damage else None

    def _options(self, settings: InferenceSettings) -> Options:
        """How to detect, by the flags, with a model whose checkpoint says ``settings``."""
        given = {each.name: getattr(self, each.name) for each in fields(Options)}
        classes = self.classes[0] if len(self.classes) == 1 else self.classes or None
        return Options(**{**given, "classes": classes, "settings": self._settings(settings)})

    def _settings(self, settings: InferenceSettings) -> InferenceSettings:
        if self.categories is not None:
            try:
                categories = sorted(read_coco(self.categories)["categories"], key=lambda category: category["id"])
                settings = settings.with_categories(categories, self.labels)
            except KeyError as error:
                raise DataError(f"annotation file {self.categories} has a category without the key {error}") from None
        return settings.with_sizes(**self.input.given())
