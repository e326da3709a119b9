"""The commit that a checkout is at, and whether its files were changed since."""

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .places import DOCS, RESULTS, ROOT

__all__ = ["commit", "commit_of"]


@functools.cache
def commit() -> str:
    """Of this checkout; "unknown" where there is none. What benchmarks write, and texts, do not count as changes."""
    return commit_of(ROOT, but=(RESULTS, DOCS, ROOT / "*.md")) or "unknown"


def commit_of(folder: Path, *, but: Sequence[Path] = ()) -> str | None:
    """The commit of a checkout, with ``-dirty`` if files of it were changed since.

    Args:
        folder: the root of the checkout.
        but: folders in it, or patterns of git's, whose files may be changed.

    Returns:
        The short name of the commit, or None where git does not know the folder or is not there.
    """
    if not (folder / ".git").exists():  # but perhaps above it
        return None
    try:
        name = _git(folder, "rev-parse", "--short", "HEAD")
        apart = [f":(exclude){path.relative_to(folder).as_posix()}" for path in but]
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *apart)
    except (FileNotFoundError, subprocess.CalledProcessError):  # git itself; a checkout without a commit
        return None
    return f"{name}-dirty" if changed else name


def _git(folder: Path, *command: str) -> str:
    process = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return process.stdout.strip()
