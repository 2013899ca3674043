"""The bounded queue between two stages."""

from __future__ import annotations

import threading
from collections.abc import Callable

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


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_bundles_lose_nothing_whatever_their_size(count: int) -> None:
    link = Link(8)
    link.bundle = 4
    given, got = frames(count), []
    reader = in_thread(lambda: got.extend(link))
    for frame in given:
        link.put(frame)
    link.end()
    reader.join()
    assert got == given


def test_a_reader_sleeps_until_a_bundle_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidpipe.link._PATIENCE_S", 600.0)
    link = Link(8)
    link.bundle = 3
    given, got = frames(3), []
    reader = in_thread(lambda: got.extend(link))
    while link._wanted == 1:
        pass
    for frame in given[:2]:
        link.put(frame)
        assert link.statistics().got == 0
    link.put(given[2])
    while link.statistics().got < 3:
        pass
    link.end()
    reader.join()
    assert got == given


def test_a_frame_that_stays_alone_is_not_kept_for_a_bundle() -> None:
    link = Link(8)
    link.bundle = 4
    (frame,) = frames(1)
    items = iter(link)
    writer = in_thread(lambda: link.put(frame))
    assert next(items) is frame
    writer.join()


def test_a_writer_sleeps_until_there_is_room_for_a_bundle() -> None:
    link = Link(4)
    link.bundle = 2
    given = frames(6)

    def write() -> None:
        for frame in given:
            link.put(frame)
        link.end()

    writer = in_thread(write)
    while link.statistics().put < 4:
        pass
    items = iter(link)
    got = [next(items)]
    assert link.statistics().put == 4
    got += items
    writer.join()
    assert got == given


def test_a_waiting_frame_can_be_looked_at() -> None:
    link = Link(4)
    given = frames(3)
    assert link.peek(0) is None
    for frame in given:
        link.put(frame)
    assert link.peek(1) is given[1]
    assert link.peek(9) is given[2]
    link.end()
    assert list(link) == given
