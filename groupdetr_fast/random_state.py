"""The states of the random number generators that a training draws from: python's, numpy's and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "random_state_kept", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """The states of this process's generators, in types that ``torch.load(weights_only=True)`` reads.

    Those of GPUs only where this process uses CUDA already: asking for them would initialise it.
    """
    version, internal, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()  # noqa: NPY002 (what a user's code may draw from)
    kind, keys, position, has_gauss, cached = of_numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set what :func:`random_state` returned; states of GPUs only where there are as many as there were."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were before.

    Those of GPUs that this process did not use before have the seed that ``torch.manual_seed`` gave them.
    """
    state, seed = random_state(), torch.initial_seed()
    try:
        yield
    finally:
        restore_random_state(state)
        if not state["cuda"] and torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)  # waits for the first use of CUDA
