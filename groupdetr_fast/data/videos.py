"""Frames of video files, cameras and streams, the right way up, by PyAV (extra ``video``)."""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .annotations import DataError

__all__ = ["VIDEO_SUFFIXES", "Frame", "FrameChoice", "Video", "is_stream", "require_video"]

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".webm", ".wmv"}
)
TIMEOUT = 20.0  # seconds without anything from a stream
FASTEST = 1000  # frames a second; where a file says so many it is the resolution of its clock
LOST = 0.02  # of the frames that a file says it has: so many may be missing without harm, as after an edit


def require_video() -> None:
    """Call this before a video is opened.

    Raises:
        ValueError: if PyAV is not installed; the sentence says how to.
    """
    if find_spec("av") is None:
        raise ValueError("videos need PyAV: pip install 'groupdetr_fast[train,video]'")


def is_stream(source: object) -> bool:
    """Whether a text or a number stands for a camera or an address, and not for a file."""
    return "://" in str(source) or (str(source).isdecimal() and not Path(str(source)).exists())


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: its number in the video, from 0 on.
        time: in seconds since the first frame.
        image: ``[3, H, W]`` uint8 RGB, the right way up.
    """

    index: int
    time: float
    image: Tensor


class FrameChoice:
    """Which frames of a video are wanted.

    Args:
        every: every so many frames, from the first one on.
        fps: at most so many of a second, as evenly as the frames allow.
        most: so many frames at most.

    Raises:
        ValueError: for both of the first two, or a number that is not positive.
    """

    def __init__(self, every: int | None = None, fps: float | None = None, most: int | None = None):
        if every is not None and fps is not None:
            raise ValueError("give every or fps, not both")
        for name, value in (("every", every), ("max_frames", most)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"fps must be positive, got {fps}")
        self.every, self.fps, self.most = every or 1, fps, most
        self._slot, self._taken = -1, 0

    def without_limit(self) -> "FrameChoice":
        """The same choice of any number of frames."""
        return FrameChoice(None if self.fps else self.every, self.fps)

    @property
    def complete(self) -> bool:
        """Whether there are as many as are wanted."""
        return self.most is not None and self._taken >= self.most

    def wants(self, index: int, time: float) -> bool:
        """Whether the next frame of a video is wanted."""
        if self.fps is None:
            wanted = index % self.every == 0
        else:
            slot = math.floor(time * self.fps + 1e-6)
            wanted = slot > self._slot
            self._slot = max(slot, self._slot)
        self._taken += wanted
        return wanted

    def expected(self, frames: int | None, rate: float | None) -> int | None:
        """How many frames will be wanted of a video that says it has so many; None if it does not."""
        if frames is not None and self.fps is not None and rate:
            frames = math.ceil(frames * min(1.0, self.fps / rate))
        elif frames is not None:
            frames = -(-frames // self.every)
        return self.most if frames is None or (self.most is not None and self.most < frames) else frames


class Video:
    """A video that is open, of which frames are read one after another.

    Args:
        source: a file; the number of a camera (Linux and macOS); an address such as ``rtsp://...``.

    Attributes:
        name: what it is called in messages, without the password of an address.
        live: whether frames come when they come: those of a camera or a stream.
        rate: frames a second, on average; None if that is not known.
        length: how many frames the file says it has; None if it does not.
        damage: of what was read so far, what is missing or cannot be read; None if nothing is.

    Raises:
        DataError: if there is no such video, or it cannot be opened.
        ValueError: if PyAV is not installed.
    """

    def __init__(self, source: str | Path | int):
        require_video()
        import av

        self.name = re.sub("(?<=://)[^/]*@", "", str(source))
        self.damage: str | None = None
        camera = is_stream(source) and "://" not in str(source)
        file, form, options = _camera(int(self.name)) if camera else (str(source), None, _options(self.name))
        if not camera and not is_stream(source) and not Path(file).exists():
            raise DataError(f"video {file} does not exist")
        timeout = TIMEOUT if is_stream(source) and not camera else None
        try:
            self._container: Any = av.open(file, format=form, options=options, timeout=timeout)
        except (av.FFmpegError, OSError, ValueError) as error:
            what = f"camera {self.name} ({file})" if camera else f"video {self.name}"
            raise DataError(f"{what} cannot be opened ({_reason(error)})") from None
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"video {self.name} has no pictures in it")
        self._stream: Any = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.live = camera or (is_stream(source) and self._container.duration is None)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = float(rate) if rate and rate < FASTEST else None
        self.length = self._stated_length()

    def _stated_length(self) -> int | None:
        if self.live:
            return None
        if self._stream.frames:
            return int(self._stream.frames)
        seconds = self._seconds()
        return None if seconds is None or self.rate is None else round(seconds * self.rate)

    def _seconds(self) -> float | None:
        """How long the file says that the pictures go on."""
        if self._stream.duration is not None and self._stream.time_base is not None:
            return float(self._stream.duration * self._stream.time_base)
        if self._container.duration is None or len(self._container.streams) > 1:  # perhaps that of the sound
            return None
        return float(self._container.duration / 1e6)

    def frames(self, choice: FrameChoice | None = None) -> Iterator[Frame]:
        """The frames of the video, or some of them; what cannot be read is left out, and said in :attr:`damage`."""
        choice = choice or FrameChoice()
        first: float | None = None
        last = -math.inf
        index = -1
        for picture in self._decoded():
            index += 1
            time = picture.time
            if time is None:  # as in a bare stream of pictures
                time = index / (self.rate or 1.0)
            first = time if first is None else first
            # A clock that jumps back, as where a stream was cut, does not go on.
            last = max(time - first, last, 0.0)
            if choice.wants(index, last):
                yield Frame(index, last, _upright(picture))
            if choice.complete:
                return

    def _decoded(self) -> Iterator[Any]:
        """The pictures, as PyAV has them."""
        import av

        read = _Read()
        demuxed = self._container.demux(self._stream)
        while not read.broken:
            try:
                packet = next(demuxed)
            except StopIteration:
                break
            except (av.FFmpegError, OSError) as error:
                read.broken, packet = _reason(error), None
            decoded, whole = self._decode(packet)
            read.packets += packet is not None and packet.size > 0
            read.unread += not whole or (packet is not None and packet.is_corrupt)
            for picture in decoded:
                read.pictures += 1
                read.time = read.time if picture.time is None else picture.time
                self.damage = self._damage(read)
                yield picture
        read.complete = True
        self.damage = self._damage(read)

    def _decode(self, packet: Any) -> tuple[list[Any], bool]:
        """The pictures that a packet completes, and whether it could be read; None for those that are left."""
        import av

        try:
            return (self._stream.codec_context.decode(None) if packet is None else packet.decode()), True
        except (av.FFmpegError, OSError):
            return [], False

    def _damage(self, read: "_Read") -> str | None:
        faults = []
        if read.unread and not self.live:  # a stream may be joined at any moment
            faults.append(f"{read.unread} of its frames cannot be read")
        if read.broken:
            faults.append(f"it breaks off after {read.pictures} frames ({read.broken})")
        elif read.complete and (early := self._early_end(read)):
            faults.append(f"it ends after {early}")
        elif read.complete and not read.pictures and not read.unread:
            faults.append("it has no frames")
        return ", and ".join(faults) or None

    def _early_end(self, read: "_Read") -> str | None:
        """After how much of what the file says it has it ends; None if that is all."""
        if self._stream.frames:
            missing = self._stream.frames - read.packets
            few = missing <= max(1, LOST * self._stream.frames)
            return None if few else f"{read.pictures} of {self._stream.frames} frames"
        seconds = self._seconds()
        if seconds is None or self.live:
            return None
        start = float(self._stream.start_time * self._stream.time_base) if self._stream.start_time else 0.0
        shown = max(0.0, read.time - start)
        return None if seconds - shown <= max(1.0, 0.05 * seconds) else f"{shown:.1f} of {seconds:.1f} seconds"

    def close(self) -> None:
        """Close the file or the connection."""
        self._container.close()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Read:
    """What has been read of a video."""

    packets: int = 0
    pictures: int = 0
    unread: int = 0  # packets
    time: float = 0.0  # of the last picture, in seconds
    broken: str = ""  # why nothing more can be read
    complete: bool = False


def _camera(number: int) -> tuple[str, str, dict[str, str]]:
    """What FFmpeg calls a camera: its file, its format, options."""
    if sys.platform == "darwin":
        return str(number), "avfoundation", {"framerate": "30"}
    if sys.platform.startswith("linux"):
        return f"/dev/video{number}", "v4l2", {}
    raise DataError("cameras have numbers on Linux and macOS only: give the address of a stream")


def _options(name: str) -> dict[str, str]:
    return {"rtsp_transport": "tcp"} if name.startswith("rtsp") else {}  # over which no packet is lost


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error)
    return text.splitlines()[0] if text else type(error).__name__


def _upright(picture: Any) -> Tensor:
    """Pixels ``[3, H, W]`` of a frame, turned as the file says: a telephone stores them as the sensor lay."""
    pixels = torch.from_numpy(picture.to_ndarray(format="rgb24"))
    turns = round((picture.rotation or 0) / 90) % 4
    if turns:
        pixels = torch.rot90(pixels, turns, (0, 1)).contiguous()
    return pixels.permute(2, 0, 1)
