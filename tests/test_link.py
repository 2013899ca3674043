"""The bounded queue between two stages."""

from __future__ import annotations

import threading

import pytest

from vidpipe.link import Link, LinkClosed, Policy
from vidpipe.testing import ManualClock, pattern, spec


def frames(count: int):
    first = spec(8, 8)
    return [pattern(first, i) for i in range(count)]


def test_frames_come_out_in_order_and_the_end_is_seen_after_them() -> None:
    link = Link(3)
    given = frames(3)
    for frame in given:
        link.put(frame)
    link.end()
    assert list(link) == given
    statistics = link.statistics()
    assert (statistics.put, statistics.got, statistics.dropped) == (3, 3, 0)


def test_a_full_link_holds_the_writer_until_the_reader_takes_one() -> None:
    link = Link(1)
    given = frames(3)

    def write() -> None:
        for frame in given:
            link.put(frame)
        link.end()

    writer = threading.Thread(target=write)
    writer.start()
    got = []
    for frame in link:
        assert link.statistics().queued <= 1
        got.append(frame)
    writer.join()
    assert got == given


def test_latest_drops_the_oldest_and_counts_it() -> None:
    link = Link(2, Policy.LATEST)
    given = frames(5)
    for frame in given:
        link.put(frame)
    link.end()
    assert list(link) == given[3:]
    assert link.statistics().dropped == 3


@pytest.mark.parametrize(("policy", "kept"), [(Policy.LATEST, 2), (Policy.BLOCK, 0)])
def test_stale_frames_are_left_out_while_later_ones_wait(policy: Policy, kept: int) -> None:
    given = frames(4)
    link = Link(4, policy, stale=lambda frame: frame is not given[2])
    for frame in given:
        link.put(frame)
    link.end()
    # The last one is stale too, but there is none behind it.
    assert list(link) == given[kept:]
    assert link.statistics().dropped == kept


def test_close_wakes_a_waiting_writer_and_a_waiting_reader() -> None:
    full, empty = Link(1), Link(1)
    (one, two) = frames(2)
    full.put(one)
    outcomes: list[str] = []

    def write() -> None:
        try:
            full.put(two)
        except LinkClosed:
            outcomes.append("writer")

    def read() -> None:
        try:
            list(empty)
        except LinkClosed:
            outcomes.append("reader")

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    full.close()
    empty.close()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == ["reader", "writer"]


def test_close_lets_go_of_queued_frames() -> None:
    link = Link(2)
    link.put(frames(1)[0])
    link.close()
    assert link.statistics().queued == 0
    with pytest.raises(LinkClosed):
        link.put(frames(1)[0])


def test_waiting_is_measured_with_the_given_clock() -> None:
    clock = ManualClock()
    link = Link(1, clock=clock)
    reader = iter(link)
    got = []
    thread = threading.Thread(target=lambda: got.append(next(reader)))
    thread.start()
    while not link._changed._waiters:  # type: ignore[attr-defined]
        pass
    clock.advance(2.5)
    link.put(frames(1)[0])
    thread.join(10)
    assert got
    assert link.statistics().reader_waited_s == 2.5


def test_capacity_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Link(0)
