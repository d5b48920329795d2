"""Getting the next item while the last one is in use, so that reading images costs no time beside computing."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, each begun in another thread when the one before it is handed out.

    What the iterator raises is raised here, where its item would have been. At most one item is held that nobody
    asked for yet; who stops early waits for it.
    """
    end = object()
    with ThreadPoolExecutor(1, "bagcert-ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # it is not `end`
