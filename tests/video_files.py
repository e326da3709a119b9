"""Videos for tests: a red square that moves to the right on black, a green one that comes later."""

import struct
from fractions import Fraction

import numpy as np
from blob_detector import draw

FORMATS = {".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".ts": "libx264", ".webm": "libvpx-vp9"}


def objects_at(index):
    """What is in a frame."""
    red = (0, 4 + 2 * index, 8, 24 + 2 * index, 28)
    return [red] if index < 5 else [red, (1, 10, 40, 30, 60)]


def write_video(path, frames=12, rate=10, height=64, width=96, times=None, **options):
    """A video of so many frames, lossless enough for the squares to stay squares.

    Args:
        times: of the frames, in seconds; by default evenly by the rate.
        options: of the container.
    """
    import av

    times = [index / rate for index in range(frames)] if times is None else times
    with av.open(str(path), "w", options=options) as container:
        codec = FORMATS[path.suffix]
        stream = container.add_stream(codec, rate=rate, options={"crf": "10"} if codec != "mpeg4" else {})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate = 2_000_000
        if codec == "libx264":
            stream.codec_context.gop_size = 4
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            pixels = np.ascontiguousarray(draw(height, width, objects_at(index)).permute(1, 2, 0).numpy())
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            scale = 1000 if codec == "libx264" else rate
            frame.pts, frame.time_base = round(time * scale), Fraction(1, scale)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path, target):
    """The same mp4 file, to be shown turned by 90 degrees clockwise, as a telephone held upright stores it."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 16  # after version, times, id, duration, layer and volume
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target
