"""Whether the hub can be reached, and what is said where a model cannot be loaded."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

__all__ = ["CONFIG_FILE", "explained", "without_hub"]

CONFIG_FILE = "config.json"
SECOND_LOOK = 1.0  # seconds after which the hub is asked again that could not be reached
PATIENCE = 5.0  # seconds for a connection, in which the system has asked for it three times
NO_WAY = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Inside, what transformers raises for a model that it cannot load becomes one sentence.

    Raises:
        ValueError: instead of what transformers and the hub's client raise.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # of the client's network library, among others, which is an implementation detail
        reason = " ".join(str(error).split("\n")[0].split()).removesuffix(".") or type(error).__name__
        raise ValueError(
            f"transformers cannot load {place!r} ({reason}): give a directory with config.json and weights, or the id "
            "of a model on the hub, with network"
        ) from None


def without_hub(place: str) -> bool:
    """Whether a model's files are to come from the cache alone, since nothing leads to the hub.

    The hub's client would try for half a minute for each file that the cache lacks, and for minutes where a firewall
    drops what is sent. A hub that is slow to answer, or answers with an error, is left to the client, which is patient.

    Raises:
        ConnectionError: if the cache does not have the model.
    """
    try:
        url = hf_hub_url(place, CONFIG_FILE)
    except HFValidationError:  # of which transformers says more
        return False
    if Path(place).exists() or _obstacle(url) is None:
        return False
    time.sleep(SECOND_LOOK)
    obstacle = _obstacle(url)
    if obstacle is not None and not isinstance(try_to_load_from_cache(place, CONFIG_FILE), str):
        raise ConnectionError(f"the hub cannot be reached: {obstacle.strerror}")
    return obstacle is not None


def _obstacle(url: str) -> OSError | None:
    """What the system says if it finds no way to a host; None if there is one, whatever the host answers."""
    try:
        get_hf_file_metadata(url, timeout=PATIENCE)
    except Exception as error:  # of the client's network library, which wraps the system's
        if type(error).__name__ == "ConnectTimeout":  # as its libraries of all versions call it
            return TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, socket.gaierror) or (isinstance(cause, OSError) and cause.errno in NO_WAY):
                return cause
            cause = cause.__cause__ or cause.__context__
    return None
