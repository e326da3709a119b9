"""Writes frames into video files, by PyAV (extra ``video``)."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from .videos import require_video

__all__ = ["VideoWriter"]

TICKS = 60_000  # a second, of the times in files that are written; MPEG-4 has at most 65,535


class VideoWriter:
    """Writes frames into an mp4 file: H.264 where PyAV has it, else MPEG-4.

    Args:
        path: the file.
        rate: frames a second, of which players want to know; each frame also has its own time.
    """

    def __init__(self, path: Path, rate: float | None = None):
        require_video()
        import av

        self.path = path
        self._codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._rate = max(Fraction(rate or 25.0).limit_denominator(1001), Fraction(1, 1001))  # and never 0
        self._container: Any = av.open(str(path), "w", format="mp4")
        self._stream: Any = None
        self._last = -1

    def add(self, image: Tensor, time: float) -> None:
        """Add a frame.

        Args:
            image: ``[3, H, W]`` uint8 RGB; one of another size than the first is resized to that.
            time: in seconds since the beginning, later than that of the frame before.
        """
        import av

        if self._stream is None:
            height, width = image.shape[-2:]
            options = {"crf": "20", "preset": "veryfast"} if self._codec == "libx264" else {"qscale": "4"}
            self._stream = self._container.add_stream(self._codec, rate=self._rate, options=options)
            # Players want sides that are even: the colours of two neighbours are stored once.
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, TICKS)
            self._size = [height, width]
        if list(image.shape[-2:]) != self._size:
            image = F.resize(image, self._size)
        image = F.pad(image, [0, 0, self._size[1] % 2, self._size[0] % 2], padding_mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), format="rgb24")
        self._last = frame.pts = max(round(time * TICKS), self._last + 1)
        frame.time_base = Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file; one without any frame is removed."""
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
        if self._stream is None:
            self.path.unlink(missing_ok=True)
