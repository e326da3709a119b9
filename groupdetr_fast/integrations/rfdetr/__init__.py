"""For RF-DETR: kernels in place of its own code, and training steps whose memory does not grow with the groups.

``accelerate`` and ``restore`` are in acceleration.py, the steps in passes.py.
"""

try:
    from .acceleration import accelerate, restore
except ImportError as error:
    raise ImportError(f"{__name__} needs rfdetr 1.11 ({error})") from error

__all__ = ["accelerate", "restore"]
