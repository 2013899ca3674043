"""Where a file is cut, and which worker gets which part."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mediagen import KEYS_X264 as X264
from mediagen import make

from vidpipe.link import LinkClosed
from vidpipe.media.decode import Decode
from vidpipe.media.ranges import Schedule, Segment, cut


class TestCut:
    def segments(self, path: Path, least_s: float = 0.7, **options: Any) -> list[Any]:
        source = Decode(path=str(path), **options)
        source.plan()
        base = source.info.video_stream.time_base if source.info else None
        assert base is not None
        return [
            tuple(None if t is None else round(float(t * base), 3) for t in (s.start, s.end))
            for s in cut(source, least_s)
        ]

    def test_every_part_begins_where_the_last_ends(self, tmp_path: Path) -> None:
        path = make(tmp_path / "in.mp4", options=X264, frames=100)
        assert self.segments(path) == [
            (None, 0.8), (0.8, 1.6), (1.6, 2.4), (2.4, 3.2), (3.2, None)
        ]  # fmt: skip
        assert self.segments(path, 1.0) == [(None, 1.6), (1.6, 3.2), (3.2, None)]

    def test_of_an_excerpt(self, tmp_path: Path) -> None:
        path = make(tmp_path / "in.mp4", options=X264, frames=100)
        got = self.segments(path, start_s=1.0, duration_s=2.0)
        assert got == [(1.0, 2.4), (2.4, 3.0)]


class TestSchedule:
    def segments(self, count: int) -> list[Segment]:
        return [Segment(i, i * 10, i * 10 + 10) for i in range(count)]

    def test_packets_come_in_the_order_of_the_file(self) -> None:
        schedule = Schedule(iter(self.segments(3)), 4)
        a, b, c = (schedule.take() for _ in range(3))
        assert schedule.take() is None
        assert a is not None
        assert b is not None
        assert c is not None
        assert schedule.at(5) is a
        assert schedule.at(10) is b
        assert schedule.at(99) is c
        schedule.put(c, ["c"], "end")
        schedule.put(a, ["a1"])
        schedule.put(b, ["b"], "end")
        schedule.put(a, ["a2"], "end")
        assert [p for _, packets, _ in schedule.parts() for p in packets] == ["a1", "a2", "b", "c"]

    def test_nobody_runs_further_ahead_than_allowed(self) -> None:
        schedule = Schedule(iter(self.segments(4)), 2)
        first, second = schedule.take(), schedule.take()
        assert first is not None
        assert second is not None
        got: list[Any] = []
        waiting = threading.Thread(target=lambda: got.append(schedule.take()))
        waiting.start()
        schedule.put(second, [], "end")
        schedule.put(first, [], "end")
        parts = schedule.parts()
        next(parts)
        assert got == []  # the first is not joined before the joiner comes back
        next(parts)
        waiting.join()
        assert got[0].index == 2

    def test_a_part_is_found_while_the_next_one_is_looked_for(self) -> None:
        looking, found = threading.Event(), threading.Event()

        def segments() -> Iterator[Segment]:
            yield Segment(0, 0, 10)
            looking.set()
            assert found.wait(30)
            yield Segment(1, 10, 20)

        schedule = Schedule(segments(), 4)
        first = schedule.take()
        got: list[Any] = []
        taking = threading.Thread(target=lambda: got.append(schedule.take()))
        taking.start()
        assert looking.wait(30)
        assert schedule.at(5) is first
        found.set()
        taking.join()
        assert got[0].index == 1

    def test_a_part_that_is_found_after_the_stop_is_not_begun(self) -> None:
        def segments() -> Iterator[Segment]:
            schedule.stop()
            yield Segment(0, 0, 10)

        schedule = Schedule(segments(), 4)
        assert schedule.take() is None
        assert schedule.take() is None
        assert schedule.taken == []
        assert list(schedule.parts()) == []

    def test_abort_wakes_everybody(self) -> None:
        schedule = Schedule(iter(self.segments(4)), 1)
        schedule.take()
        ended: list[str] = []

        def take() -> None:
            with pytest.raises(LinkClosed):
                schedule.take()
            ended.append("take")

        def parts() -> None:
            with pytest.raises(LinkClosed):
                list(schedule.parts())
            ended.append("parts")

        threads = [threading.Thread(target=t) for t in (take, parts)]
        for thread in threads:
            thread.start()
        schedule.abort()
        for thread in threads:
            thread.join()
        assert sorted(ended) == ["parts", "take"]
