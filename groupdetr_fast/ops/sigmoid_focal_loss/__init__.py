from .op import sigmoid_focal_loss
from .reference import IGNORED, NO_OBJECT

__all__ = ["IGNORED", "NO_OBJECT", "sigmoid_focal_loss"]
