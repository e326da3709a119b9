"""Peers that cannot simply be imported."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

# `make bench` installs peers_apart.txt into this folder, which is on nobody's path.
FOLDER = Path(sys.prefix) / "peers"


@functools.cache
def lapx() -> ModuleType:
    """The package of lapx, which is called ``lap``, as that of lap is: the two cannot be installed side by side.

    Raises:
        ImportError: if it is not in :data:`FOLDER`.
    """
    if not (FOLDER / "lap").is_dir():
        raise ImportError(f"lapx is not in {FOLDER}: run make bench")
    kept = {name: sys.modules.pop(name) for name in _names_of_lap()}
    sys.path.insert(0, str(FOLDER))
    try:
        package = importlib.import_module("lap")
        package.lapjvr_batch  # noqa: B018 - lapx imports what is asked for only then, and its folder must be on the path
    finally:
        sys.path.remove(str(FOLDER))
        for name in _names_of_lap():
            del sys.modules[name]
        sys.modules.update(kept)
    return package


def _names_of_lap() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "lap"]
