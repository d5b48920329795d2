"""One item ahead: the same items, begun earlier, in another thread."""

import threading
from collections.abc import Iterator

import pytest

from bagcert.data.prefetch import prefetch


def counted(stop: int, begun: list[int], fail_at: int | None = None) -> Iterator[int]:
    for number in range(stop):
        begun.append(number)
        if number == fail_at:
            raise ValueError(f"item {number}")
        yield number


def test_the_same_items_in_the_same_order() -> None:
    assert list(prefetch(iter(range(20)))) == list(range(20))
    assert list(prefetch(iter([]))) == []


def test_next_item_made_in_another_thread() -> None:
    made = threading.Event()
    threads = []

    def items() -> Iterator[int]:
        threads.append(threading.current_thread())
        yield 0
        made.set()
        yield 1

    found = prefetch(items())
    assert next(found) == 0
    assert made.wait(30), "nobody has asked for item 1, and it is there"
    assert list(found) == [1]
    assert threads[0] is not threading.current_thread()


def test_no_more_than_one_is_held() -> None:
    begun: list[int] = []
    found = prefetch(counted(10, begun))
    assert next(found) == 0
    found.close()
    assert begun in ([0], [0, 1])


def test_an_error_comes_in_place_of_its_item() -> None:
    begun: list[int] = []
    found = prefetch(counted(10, begun, fail_at=2))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(found)
