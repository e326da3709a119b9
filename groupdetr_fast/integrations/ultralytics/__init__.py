"""For Ultralytics' RT-DETR: kernels in place of its own code, in its own trainer.

``accelerate`` and ``restore`` are in acceleration.py, the trainer in training.py. Ultralytics has a licence of its own,
the AGPL-3.0; this package contains none of its code.
"""

try:
    from .acceleration import accelerate, restore
    from .training import AcceleratedTrainer
except ImportError as error:
    raise ImportError(f"{__name__} needs ultralytics 8.4 ({error})") from error

__all__ = ["AcceleratedTrainer", "accelerate", "restore"]
