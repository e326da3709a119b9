"""The command ``groupdetr predict``."""

from .command import PredictCommand

__all__ = ["PredictCommand"]
