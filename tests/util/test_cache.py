"""The cache keeps within its bound, drops the oldest first, and makes each value once."""

from __future__ import annotations

import random
import sys
import threading

import pytest

from qcow2snap_core.util.cache import BoundedCache


def in_threads(count, work):
    """Run ``work(n)`` in so many threads at once; their first exception is raised here."""
    start = threading.Barrier(count)
    failures = []

    def body(n):
        start.wait()
        try:
            work(n)
        except BaseException as e:  # noqa: BLE001 (handed over to the test)
            failures.append(e)

    threads = [threading.Thread(target=body, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def filled(limit, **sizes):
    cache = BoundedCache(limit)
    for key, size in sizes.items():
        cache.load(key, key.upper, size)
    return cache


def test_a_value_is_made_once_and_then_found():
    cache = BoundedCache(10)
    assert cache.get("a") is None
    assert cache.load("a", lambda: "first", 5) == "first"
    assert cache.load("a", lambda: "second", 5) == "first"
    assert cache.get("a") == "first"


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ({"a": 4, "b": 4}, "ab"),
        ({"a": 5, "b": 5}, "ab"),
        ({"a": 4, "b": 4, "c": 4}, "bc"),
        ({"a": 1, "b": 1, "c": 9}, "bc"),
        ({"a": 4, "b": 4, "c": 10}, "c"),
        ({"a": 4, "b": 4, "c": 11}, "ab"),
    ],
)
def test_the_oldest_make_room_for_the_new(sizes, kept):
    cache = filled(10, **sizes)
    assert "".join(k for k in sizes if cache.get(k)) == kept
    assert cache.used == sum(sizes[k] for k in kept)


def test_a_value_larger_than_the_bound_is_returned_and_not_kept():
    cache = BoundedCache(10)
    assert cache.load("a", lambda: "large", 11) == "large"
    assert cache.get("a") is None
    assert cache.load("a", lambda: "again", 11) == "again"


def test_a_bound_of_nothing_keeps_nothing():
    assert filled(0, a=1, b=1).used == 0


def test_a_failure_is_passed_on_and_the_next_try_makes_the_value():
    cache = BoundedCache(10)
    with pytest.raises(ZeroDivisionError):
        cache.load("a", lambda: 1 // 0, 1)
    assert cache.load("a", lambda: "whole", 1) == "whole"


def test_many_threads_make_a_value_once():
    cache, made = BoundedCache(10), []

    def make():
        made.append(threading.get_ident())
        return "value"

    in_threads(16, lambda n: cache.load("a", make, 1))
    assert len(made) == 1


def test_two_values_are_made_at_the_same_time():
    cache, both = BoundedCache(10), threading.Barrier(2)
    in_threads(2, lambda n: cache.load(n, lambda: both.wait(30), 1))


def test_the_bound_holds_while_threads_drop_each_others_values():
    """Each value is dropped while others wait for it, so it is made by several at once."""
    cache = BoundedCache(2)

    def work(n):
        rng = random.Random(n)
        for _ in range(3000):
            key = rng.randrange(3)
            assert cache.load(key, lambda key=key: str(key), 1) == str(key)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(8, work)
    finally:
        sys.setswitchinterval(before)
    assert cache.used == sum(1 for key in range(3) if cache.get(key))
