"""What the arguments of ``groupdetr predict`` stand for: images, videos, cameras."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data import DataError
from ...data.images import IMAGE_SUFFIXES
from ...data.videos import VIDEO_SUFFIXES, is_stream

__all__ = ["Sources", "find_sources", "unlike_each_other"]


@dataclass(frozen=True)
class Sources:
    """What to detect in.

    Attributes:
        images: files.
        videos: files; numbers of cameras and addresses of streams, as texts.
    """

    images: tuple[Path, ...]
    videos: tuple[str, ...]

    @property
    def exist(self) -> bool:
        """Whether any of them is there, as far as is known without a connection."""
        return any(path.exists() for path in self.images) or any(
            is_stream(video) or Path(video).exists() for video in self.videos
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Without cameras and streams."""
        return *self.images, *(Path(video) for video in self.videos if not is_stream(video))

    def __str__(self) -> str:
        return ", ".join([*map(str, self.images), *self.videos])


def find_sources(names: Sequence[str], *, besides: Path | None = None) -> Sources:
    """The images and the videos that are meant.

    Args:
        names: files; folders, of which the images and videos directly in them are meant; patterns of ``glob``, where
            ``**`` goes through folders; numbers of cameras; addresses of streams.
        besides: a folder whose content folders and patterns leave out, as that of earlier results.

    Returns:
        Paths without repetition, in the order of ``names``. A file that is named need not exist.

    Raises:
        DataError: if a folder or a pattern has no images and no videos, or nothing is named.
    """
    images: dict[Path, None] = {}
    videos: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if is_stream(name):
            videos[name] = None
            continue
        if path.is_dir():
            candidates = sorted(path.iterdir())
        elif not path.exists() and glob.has_magic(name):
            candidates = sorted(map(Path, glob.glob(name, recursive=True)))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos[name] = None
            continue
        else:
            images[path] = None
            continue
        known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        inside = [
            each
            for each in candidates
            if each.suffix.lower() in known and (besides is None or besides not in each.parents)
        ]
        if not inside:
            deeper = path.is_dir() and any(each.suffix.lower() in known for each in path.rglob("*"))
            hint = f': those of the folders in it are "{path / "**" / "*"}"' if deeper else ""
            raise DataError(f"there are no images in {name}, and no videos{hint}")
        images |= {each: None for each in inside if each.suffix.lower() in IMAGE_SUFFIXES}
        videos |= {str(each): None for each in inside if each.suffix.lower() in VIDEO_SUFFIXES}
    if not images and not videos:
        raise DataError("name the images: files, folders or patterns; or videos, the number of a camera, a stream")
    return Sources(tuple(images), tuple(videos))


def unlike_each_other(stems: Iterable[str]) -> list[str]:
    """The stems of files, each with the first number behind it that makes it unlike those before."""
    names: dict[str, None] = {}
    last: dict[str, int] = {}
    for stem in stems:
        name = stem
        while name in names:
            last[stem] = last.get(stem, 1) + 1
            name = f"{stem}_{last[stem]}"
        names[name] = None
    return list(names)
