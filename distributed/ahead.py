"""Reading ahead, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_NUM_THREADS = 8


def ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int = _NUM_THREADS) -> Iterator[R]:
    """`function` of each item, in order; at most `num_threads` results are under way or waiting to be taken."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
