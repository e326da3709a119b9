"""Images that are read ahead by threads, and batches of such as have about the same size."""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from ..data.config import MOST_WORKERS, usable_cores

__all__ = ["Sized", "batches_by_size", "default_workers", "prefetched", "read_ahead"]

T = TypeVar("T")
R = TypeVar("R")

LONGEST_ITEM = 30.0  # seconds until a thread that is no longer needed is left to itself
POOL = 4  # batches among whose images those of similar size are chosen


class Sized(Protocol):
    """Something to put into a batch."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as it is put there."""


S = TypeVar("S", bound=Sized)


def default_workers() -> int:
    """Threads that read images, where nobody says how many."""
    return min(MOST_WORKERS, usable_cores())


def read_ahead(
    items: Iterable[T], read: Callable[[int, T], R], *, workers: int, ahead: int, in_thread: Callable[[T], bool]
) -> Iterator[R]:
    """What is read of items, in their order.

    Args:
        items: taken one after another, by the thread that iterates.
        read: called for each with its number, from 0 on; an error that it raises is raised when the item has its turn.
        workers: threads; 0 to read when the turn comes, and never before.
        ahead: items that are read, or being read, before their turn.
        in_thread: which items are read by threads. Others are read as soon as they are taken, so that none of them is
            in memory when the next one is made.
    """
    remaining = iter(items)
    if workers < 1:
        yield from map(read, itertools.count(), remaining)
        return
    numbers = itertools.count()
    pending: deque[Future[R]] = deque()
    threads = ThreadPoolExecutor(workers, thread_name_prefix="read-images")
    try:
        while True:
            while len(pending) < ahead and (taken := list(_next(remaining))):
                number, item = next(numbers), taken.pop()
                pending.append(threads.submit(read, number, item) if in_thread(item) else _done(read, number, item))
                del item
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _next(items: Iterator[T]) -> Iterator[T]:
    """The next item, if there is one."""
    for item in items:
        yield item
        return


def _done(read: Callable[[int, T], R], number: int, item: T) -> "Future[R]":
    future: Future[R] = Future()
    try:
        future.set_result(read(number, item))
    except Exception as error:
        future.set_exception(error)
    return future


def batches_by_size(samples: Iterable[S], batch_size: int, *, ordered: bool = False) -> Iterator[list[S]]:
    """Batches in which little is padding: the oldest sample that is left, and those most like it in size.

    Args:
        samples: at most four batches of them are held.
        batch_size: samples of a batch, but perhaps for the last one.
        ordered: keep the order of the samples, whatever their sizes.
    """
    pool: list[S] = []
    for sample in samples:
        pool.append(sample)
        same = sum(each.size == pool[0].size for each in pool)
        if same >= batch_size or len(pool) >= (1 if ordered else POOL) * batch_size:
            yield _take(pool, batch_size, ordered)
    while pool:
        yield _take(pool, batch_size, ordered)


def _take(pool: list[S], batch_size: int, ordered: bool) -> list[S]:
    height, width = pool[0].size
    order = list(range(len(pool)))
    if not ordered:
        order.sort(key=lambda index: abs(pool[index].size[0] - height) + abs(pool[index].size[1] - width))
    taken = sorted(order[:batch_size])
    batch = [pool[index] for index in taken]
    for index in reversed(taken):
        del pool[index]
    return batch


def prefetched(items: Iterable[T], ahead: int, *, newest: bool = False) -> Generator[T, None, None]:
    """The items of an iterable that a thread goes through.

    Args:
        items: an error that it raises is raised here, after the items before it.
        ahead: items that wait, at most.
        newest: do not let the thread wait where so many wait already, but drop the oldest of them, as for items that
            are only good at the time they come.
    """
    done = object()
    waiting: queue.Queue[Any] = queue.Queue(max(1, ahead))
    stop = threading.Event()

    def put(item: Any, wait: bool) -> None:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.1 if wait else 1e-6)
                return
            except queue.Full:
                if not wait:
                    with contextlib.suppress(queue.Empty):
                        waiting.get_nowait()

    def work() -> None:
        remaining = iter(items)
        try:
            while not stop.is_set() and (taken := list(_next(remaining))):
                put((taken.pop(), None), not newest)
            put((done, None), True)
        except BaseException as error:  # for the thread that iterates
            put((done, error), True)
        finally:
            if isinstance(remaining, Generator):
                remaining.close()

    thread = threading.Thread(target=work, name="read-frames", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
            del item
    finally:
        stop.set()
        thread.join(LONGEST_ITEM)
