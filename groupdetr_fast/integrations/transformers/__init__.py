"""For the models of Hugging Face transformers: groups of queries, and kernels in place of their own code.

``add_groups`` and ``remove_groups`` are in groups.py, ``accelerate`` and ``restore`` in acceleration.py.
"""

try:
    from .acceleration import accelerate, restore
    from .groups import add_groups, remove_groups
except ImportError as error:
    raise ImportError(f"{__name__} needs transformers 5.2 or newer ({error})") from error

__all__ = ["accelerate", "add_groups", "remove_groups", "restore"]
