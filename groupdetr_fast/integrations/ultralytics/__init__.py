"""For Ultralytics' RT-DETR: kernels in place of its own code, in its own trainer, and groups of queries.

``accelerate`` and ``restore`` are in acceleration.py, the trainers in training.py and group_training.py. Ultralytics
has a licence of its own, the AGPL-3.0; this package contains none of its code.
"""

try:
    from .acceleration import accelerate, restore
    from .group_training import group_trainer
    from .training import AcceleratedTrainer
except ImportError as error:
    raise ImportError(f"{__name__} needs ultralytics>=8.4.190,<8.5 ({error})") from error

__all__ = ["AcceleratedTrainer", "accelerate", "group_trainer", "restore"]
