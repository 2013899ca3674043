"""Sources: files at their own pace, pictures of any format, sources that go away."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from livekit import (
    Sender,
    clock_and_beep,
    free_port,
    same,
    until,
)

from vidpipe.errors import MediaError
from vidpipe.frame import Frame
from vidpipe.live.address import parse_source
from vidpipe.live.capture import Capture
from vidpipe.live.reader import Connection, Timeline
from vidpipe.testing import ManualClock

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_file_is_read_at_its_own_pace_again_and_again(tmp_path: Path) -> None:
    path = clock_and_beep(tmp_path / "clip.mkv", seconds=1)
    capture = Capture(address=str(path))
    assert capture.plan().rate == 25
    start_s = time.perf_counter()
    frames = []
    for frame in capture.frames():
        frames.append((frame.pts, time.perf_counter() - start_s))
        if len(frames) == 40:
            capture.stop()
    capture.close()
    took_s = frames[-1][1]
    assert took_s > 1.2  # never faster than its own pace
    times = [pts for pts, _ in frames]
    assert times == sorted(set(times))
    assert capture.has_sound


class Advanced:
    """Stands for the event that ends a wait: nobody sets it, and the clock does the waiting."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def wait(self, seconds: float) -> bool:
        self._clock.advance(seconds)
        return False

    def is_set(self) -> bool:
        return False


def test_pictures_of_a_file_with_b_frames_come_evenly_and_in_time(tmp_path: Path) -> None:
    path = clock_and_beep(tmp_path / "clip.mkv", seconds=2, b_frames=3)
    clock = ManualClock(5.0)
    arrivals: list[float] = []
    sound: list[Any] = []
    for _ in range(2):  # as a loop does it
        stop: Any = Advanced(clock)
        timeline = Timeline(clock, 5.0)
        connection = Connection(
            parse_source(str(path)), clock, timeline, stop=stop, sound=sound.append
        )
        for picture in connection.frames():
            arrivals.append(clock.now_s() - 5.0)
            # Its time is when it comes, not when the decoder got its first part.
            assert picture.captured_s == clock.now_s()
            assert abs(float(picture.time_s) - arrivals[-1]) < 1e-3
        connection.close()
    assert arrivals == pytest.approx([n / 25 for n in range(100)], abs=2e-3)
    assert [round(chunk.time_s) for chunk in sound].count(2) > 10


def test_a_file_that_is_not_looped_ends(tmp_path: Path) -> None:
    path = clock_and_beep(tmp_path / "clip.mkv", seconds=1)
    capture = Capture(address=str(path), loop=False)
    capture.plan()
    assert sum(1 for _ in capture.frames()) + capture.overwritten + capture.early == 25
    capture.close()
    assert capture.report()["losses"] == 0


def test_what_comes_before_the_stages_are_open_is_no_drop_of_theirs(tmp_path: Path) -> None:
    capture = Capture(address=str(clock_and_beep(tmp_path / "clip.mkv", seconds=1)), loop=False)
    capture.plan()
    until(lambda: capture._ended)
    assert [frame.pts > 0 for frame in capture.frames()] == [True]  # the last
    capture.close()
    assert (capture.early, capture.overwritten) == (24, 0)


@pytest.mark.parametrize("pixels", ["rgb24", "yuyv422", "yuv444p", "yuv420p10le"])
def test_every_picture_comes_in_eight_bits_of_420(tmp_path: Path, pixels: str) -> None:
    path = tmp_path / "clip.nut"
    codec = "ffv1" if pixels in ("yuv444p", "yuv420p10le") else "rawvideo"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 128, np.uint8), "rgb24")
        for number in range(3):
            frame = grey.reformat(format=pixels)
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    capture = Capture(address=str(path))
    found = capture.plan()
    frame = next(capture.frames())
    capture.close()
    assert found.format.name == "yuv420p"
    assert np.abs(frame.planes[0].astype(int) - 126).max() <= 3  # 128 in limited range
    assert np.abs(frame.planes[1].astype(int) - 128).max() <= 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("v4l2:/dev/video99", "there is no camera '/dev/video99'"),
        ("rtmp://127.0.0.1:1/live/key", r"'rtmp://127\.0\.0\.1:1/live/\.\.\.' cannot be read"),
        ("rtsp://127.0.0.1:1/cam", "Is the server running"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(address: str, message: str) -> None:
    capture = Capture(address=address, timeout_s=2)
    with pytest.raises(MediaError, match=message) as caught:
        capture.plan()
    assert "\n" not in str(caught.value)


def test_a_file_without_a_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(64 * 1024))
    with pytest.raises(MediaError, match="cannot be read"):
        Capture(address=str(path)).plan()


@pytest.mark.parametrize("lost", ["hold", "slate"])
def test_a_lost_source_shows_its_last_picture_and_comes_back(lost: Any) -> None:
    port = free_port()
    sender = Sender(port)
    sender.start()
    capture = Capture(address=f"udp://127.0.0.1:{port}", timeout_s=0.5, lost=lost)
    events: list[dict[str, Any]] = []
    capture.notify = events.append
    seen: list[Frame] = []
    try:
        capture.plan()
        reader = threading.Thread(target=lambda: seen.extend(capture.frames()), daemon=True)
        reader.start()
        until(lambda: len(seen) > 5)
        sender.stop()
        until(lambda: capture.state == "lost")
        count = len(seen)
        last = seen[-1]
        until(lambda: len(seen) > count + 3)
        assert capture.repeated >= 3
        if lost == "hold":
            assert same(seen[-1].planes, last.planes)
        else:
            assert (seen[-1].planes[0][24] == [180, 180] + 60 * [40] + [180, 180]).all()
        sender.start()
        until(lambda: capture.state == "live")
        assert [e["state"] for e in events] == ["lost", "live"]
        assert capture.report()["losses"] == 1
        times = [f.pts for f in seen]
        assert times == sorted(set(times))
    finally:
        sender.stop()
        capture.stop()
        capture.close()
        reader.join()
