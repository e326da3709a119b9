"""From a checkpoint and images or videos to named detections, without a data set (extra ``train``)."""

from ..data.transforms import EVAL_SETTINGS
from .for_supervision import to_supervision
from .images import predict
from .loading import describe_model, load_model
from .options import Options, PredictOptions
from .settings import InferenceSettings, settings_of
from .video import predict_video

__all__ = [
    "EVAL_SETTINGS",
    "InferenceSettings",
    "Options",
    "PredictOptions",
    "describe_model",
    "load_model",
    "predict",
    "predict_video",
    "settings_of",
    "to_supervision",
]
