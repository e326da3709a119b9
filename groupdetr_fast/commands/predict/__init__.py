"""The command ``groupdetr predict``."""

from .command import PredictCommand
from .sources import find_images

__all__ = ["PredictCommand", "find_images"]
