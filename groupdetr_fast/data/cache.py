"""Folders of files that are made once and found again."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_root", "made_once"]


def cache_root() -> Path:
    """``$GROUPDETR_FAST_CACHE``, else ``$XDG_CACHE_HOME/groupdetr_fast``, else ``~/.cache/groupdetr_fast``."""
    if own := os.environ.get("GROUPDETR_FAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groupdetr_fast"


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is there.

    It appears under its name only when it is complete, so that an interrupted call leaves nothing that a later one
    would take for the whole, and several processes may call this at once.

    Args:
        folder: to be there afterwards.
        make: fills the empty folder that it is given; an error leaves nothing behind.

    Raises:
        OSError: if the folder cannot be written.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
