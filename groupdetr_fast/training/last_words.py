"""The sentence with which processes end that a launcher has started: said once where all of them end alike."""

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .faults import StopRequest

__all__ = ["first_says"]

PATIENCE = 5.0  # seconds to wait for the first process, which may be slower, or go on
INTERVAL = 0.02  # seconds
KEY = "sentence"


def first_says(sentence: str) -> bool:
    """Whether the first process ends with the same sentence, so that this one need not say it.

    Every process calls this when it ends with a sentence, whatever the others do meanwhile. They hear of each other by
    the store of the launcher, not by a collective, in which another process may be waiting for something else. The
    first process gets False at once; so does every process where the launcher has no store, as that of MPI. The others
    wait for the first for at most :data:`PATIENCE` seconds, and get False if it says nothing, or something else; nor
    do they wait once they are asked to end, as launchers ask all when the first was killed.
    """
    with StopRequest() as asked:
        store = _store()
        if store is None:
            return False
        try:
            if os.environ["RANK"] == "0":
                store.set(KEY, sentence)
                return False
            deadline = time.monotonic() + PATIENCE
            while not store.check([KEY]):
                if asked.received or time.monotonic() > deadline:
                    return False
                time.sleep(INTERVAL)
            return bool(store.get(KEY) == sentence.encode())
        except RuntimeError:  # the launcher has ended, and its store with it
            return False


def _are_launched() -> bool:
    """Whether a launcher has started this process with others: torchrun, or accelerate launch for several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def _store() -> Any:
    """The store of the launcher, in which this attempt to run the processes has keys of its own; None without one."""
    if not _are_launched() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not dist.is_available():
        return None
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=PATIENCE),
            wait_for_workers=False,
        )
    except RuntimeError:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"groupdetr_fast/{attempt}", store)  # type: ignore[attr-defined, unused-ignore]
