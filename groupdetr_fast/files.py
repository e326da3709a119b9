"""Files that are whole at any moment, whenever the process or the machine stops."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["force_to_disk", "read_json", "write_json", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader, or whoever comes after a crash, finds the old text or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    force_to_disk(unfinished)
    os.replace(unfinished, path)


def write_json(path: Path, content: Any) -> None:
    """Write a json file that is either whole or not there."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a json file; None if there is none, or if it is only half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def force_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
