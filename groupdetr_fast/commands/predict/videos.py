"""What ``groupdetr predict`` writes about videos."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ...data.video_writer import VideoWriter
from ...data.videos import Frame, Video, is_stream
from ...evaluation.visualize import draw_frame
from ...files import write_whole
from ...prediction import InferenceSettings
from .coco import as_entries, categories
from .drawing import DrawingThread

__all__ = ["VIDEOS", "FrameFormat", "VideoResults", "stem_of"]

VIDEOS = "videos"  # the folder
FrameFormat = Literal["jsonl", "coco"]


def stem_of(source: str) -> str:
    """What files about a video are called, without their endings."""
    if "://" in source:
        parts = urlsplit(source)
        return Path(parts.path).stem or parts.hostname or "stream"
    return f"camera_{source}" if is_stream(source) else Path(source).stem


class VideoResults:
    """Writes the results of a video, frame by frame.

    Args:
        folder: where to; the files are called ``stem`` and .mp4, .jsonl or .json.
        stem: unlike those of other videos.
        video: what the frames are of.
        settings: names of the classes.
        form: json lines, a line for each frame, or a COCO file.
        annotated: whether to write the frames with their detections, as a video.
        rate: frames a second of that video; None if that is not known.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        video: Video,
        settings: InferenceSettings,
        *,
        form: FrameFormat,
        annotated: bool,
        rate: float | None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.stem, self.video, self.settings, self.form = stem, video, settings, form
        self.path = folder / f"{stem}.{'jsonl' if form == 'jsonl' else 'json'}"
        for earlier in (f"{stem}.mp4", f"{stem}.jsonl", f"{stem}.json"):
            (folder / earlier).unlink(missing_ok=True)
        self._lines = self.path.open("w") if form == "jsonl" else None
        self._writer = VideoWriter(folder / f"{stem}.mp4", rate) if annotated else None
        self._drawing = DrawingThread()
        self._content: dict[str, list[dict[str, Any]]] = {"videos": [], "images": [], "annotations": []}
        self.frames = self.detections = 0

    def add(self, frame: Frame, detection: Mapping[str, Any]) -> None:
        """Add a frame with its detections."""
        entries = as_entries(detection, self.settings)
        self.frames, self.detections = self.frames + 1, self.detections + len(entries)
        height, width = frame.image.shape[1:]
        size, time = {"width": width, "height": height}, round(frame.time, 6)
        if self._lines is not None:
            for entry, name in zip(entries, detection["class_names"], strict=True):
                entry["category"] = name
            line = {"video": self.video.name, "frame": frame.index, "time": time, **size, "detections": entries}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()  # for whoever follows the file of a camera
        else:
            self._add_to_coco(frame, size, time, entries)
        if self._writer is not None:
            self._drawing.add(self._draw, frame, detection)

    def _draw(self, frame: Frame, detection: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._writer.add(draw_frame(frame.image, detection, self.settings.class_names), frame.time)

    def _add_to_coco(self, frame: Frame, size: dict[str, int], time: float, entries: list[dict[str, Any]]) -> None:
        content = self._content
        if not content["videos"]:
            content["videos"].append({"id": 1, "file_name": self.video.name, **size})
        name = f"{self.stem}_{frame.index:06d}.jpg"  # as which FFmpeg would extract it
        image = {"id": self.frames, "file_name": name, **size, "video_id": 1, "frame_id": frame.index, "time": time}
        content["images"].append(image)
        for entry in entries:
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": self.frames, **entry, "iscrowd": 0})

    def finish(self) -> None:
        """Finish the files, and say what is in them; also if a frame cannot be drawn."""
        with ExitStack() as finishing:  # each of them, the last one first, even if another fails
            finishing.callback(self._say)
            if self._writer is not None:
                finishing.callback(self._writer.close)
            finishing.callback(self._write)
            self._drawing.finish()

    def _write(self) -> None:
        if self._lines is not None:
            self._lines.close()
        else:
            detected = (entry["category_id"] for entry in self._content["annotations"])
            content = {**self._content, "categories": categories(self.settings, detected)}
            write_whole(self.path, json.dumps(content) + "\n")

    def _say(self) -> None:
        files = [self.path, *((self._writer.path,) if self._writer is not None else ())]
        shown = ", ".join(str(path) for path in files if path.exists())
        print(f"{self.detections} detections in {self.frames} frames of {self.video.name}: {shown}")
