"""Prefetch one item in a background thread, so that reading images overlaps with computation."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Iterates over the same items in the same order, and prefetches the next one in another thread.

    An exception of the iterator is raised in place of its item. At most one item is prefetched. Closing the iterator
    early waits for it.
    """
    end = object()
    with ThreadPoolExecutor(1, "bagcert-ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # it is not `end`
