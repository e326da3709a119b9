"""Detections in the frames of a video, one after another."""

import itertools
import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from ..data.videos import Frame, FrameChoice, Video
from .batches import prefetched
from .images import Predictor
from .options import Options, PredictOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["detect_frames", "predict_video"]

logger = logging.getLogger(__name__)

VideoDetection = tuple[int, float, dict[str, Any]]
ShownDetection = tuple[int, float, dict[str, Any], Tensor]


@overload
def predict_video(
    model: nn.Module,
    source: str | Path | int,
    *,
    every: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    frames: Literal[False] = False,
    **options: "Unpack[PredictOptions]",
) -> Iterator[VideoDetection]: ...


@overload
def predict_video(
    model: nn.Module,
    source: str | Path | int,
    *,
    every: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    frames: Literal[True],
    **options: "Unpack[PredictOptions]",
) -> Iterator[ShownDetection]: ...


def predict_video(
    model: nn.Module,
    source: str | Path | int,
    *,
    every: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    frames: bool = False,
    **options: "Unpack[PredictOptions]",
) -> Iterator[VideoDetection] | Iterator[ShownDetection]:
    """Detect objects in the frames of a video (extra ``video``).

    Frames are decoded by a thread, a few ahead, and none is kept. Of a camera or a stream the newest frame is taken,
    and those that came while the model was busy are left out. Where a file is damaged, the frames that can be read
    are given, and a warning is logged.

    Args:
        model: as in :func:`predict`.
        source: a video file, the number of a camera, or the address of a stream such as ``rtsp://...``.
        every: every so many frames; None for all of them.
        fps: in place of ``every``, at most so many frames of a second.
        max_frames: how many frames at most.
        frames: also give the frames.
        **options: as in :func:`predict`, see :class:`Options`.

    Yields:
        The number of the frame in the video, from 0 on; its time in seconds since the first frame; its detections, as
        :func:`predict` returns them; and with ``frames`` the frame, ``[3, H, W]`` uint8 RGB, the right way up.

    Raises:
        DataError: if there is no such video, or it cannot be opened.
        ValueError: without PyAV; for ``every`` and ``fps`` together or one that is not positive; and as
            :func:`predict`.
    """
    predictor = Predictor(model, Options(**options))
    choice = FrameChoice(every, fps, max_frames)
    video = Video(source)

    def detected() -> Iterator[Any]:
        with video, closing(detect_frames(predictor, video, choice)) as found:
            for frame, detection in found:
                yield (frame.index, frame.time, detection, *((frame.image,) if frames else ()))
        if video.damage:
            logger.warning("video %s: %s", video.name, video.damage)

    return detected()


def detect_frames(
    predictor: Predictor, video: Video, choice: FrameChoice
) -> Generator[tuple[Frame, dict[str, Any]], None, None]:
    """The frames that are chosen of a video, in their order, with their detections."""
    if video.live:
        # One at a time and none ahead, so that what is seen is the present.
        batch_size = 1
        frames = prefetched(video.frames(choice.without_limit()), 1, newest=True)
    else:
        batch_size = predictor.options.batch_size
        frames = prefetched(video.frames(choice), 2 * batch_size)

    def read(frame: Frame) -> tuple[Tensor, Frame]:
        return frame.image, frame

    with closing(frames):
        found = predictor.detect(
            frames, read, in_thread=lambda _: False, ordered=True, workers=0, batch_size=batch_size
        )
        for each in itertools.islice(found, choice.most):
            yield each.extra, each.detection
