"""Outputs: recordings, streams, cameras; sound that stays with its picture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
from livekit import (
    Feed,
    Peer,
    Received,
    clock_and_beep,
    free_port,
    live_spec,
    sound_after_picture,
    until,
)

from vidpipe.errors import InputError, MissingExtraError, OutputError, SpecError
from vidpipe.graph import Graph
from vidpipe.live.capture import Frames
from vidpipe.live.outputs import Callback, Record, StreamOut
from vidpipe.live.session import Live
from vidpipe.live.virtualcam import VirtualCamera, packed
from vidpipe.testing import ManualClock, pattern, spec

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("name", ["out.mkv", "out.mp4"])
def test_sound_stays_with_the_picture_in_a_recording(
    tmp_path: Path, doubler: str, name: str
) -> None:
    clip = clock_and_beep(tmp_path / "clip.mkv")
    graph = Graph().add("in", "capture", address=str(clip), loop=False)
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", "record", "enhance", path=str(tmp_path / name))
    live = Live(graph)
    live.start()
    assert live.wait(30)
    assert live.pipeline.report().problems == []
    with av.open(str(tmp_path / name)) as file:
        late_s = sound_after_picture(file)
    assert len(late_s) >= 2
    assert max(abs(d) for d in late_s) <= 0.04, late_s


def test_sound_stays_with_the_picture_in_a_stream(tmp_path: Path, doubler: str) -> None:
    clip = clock_and_beep(tmp_path / "clip.mkv", seconds=4)
    port = free_port()
    graph = Graph().add("in", "capture", address=str(clip), loop=False)
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", "stream", "enhance", url=f"udp://127.0.0.1:{port}")
    live = Live(graph)
    listener = Received(port)
    live.start()
    assert live.wait(30)
    data = listener.stop()
    assert live.pipeline.report().problems == []
    path = tmp_path / "received.ts"
    path.write_bytes(data)
    with av.open(str(path)) as file:
        late_s = sound_after_picture(file)
    assert len(late_s) >= 2
    assert max(abs(d) for d in late_s) <= 0.04, late_s


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_recording_survives_a_kill(tmp_path: Path, doubler: str, suffix: str) -> None:
    clip = clock_and_beep(tmp_path / "clip.mkv", seconds=6)
    path = tmp_path / f"out.{suffix}"
    code = (
        "import sys; from vidpipe.graph import Graph; from vidpipe.live.session import Live\n"
        "g = Graph().add('in', 'capture', address=sys.argv[1])\n"
        "g.add('e', 'enhance', 'in', tiers=[sys.argv[2]], latency_budget_s=5.0)\n"
        "g.add('o', 'record', 'e', path=sys.argv[3])\n"
        "live = Live(g); live.start()\n"
        "while not live.wait(0.1):\n"
        "    print(live.sinks['o'].measure(live.clock).read().frames, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(clip), doubler, str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 75:
            break
    process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    process.wait()
    process.stdout.close()
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
        sounds = len(file.streams.audio)
    assert frames >= 25  # what is lost is less than a second and a fragment
    assert sounds == 1


def test_recordings_are_not_overwritten_and_have_known_names(tmp_path: Path) -> None:
    path = tmp_path / "there.mkv"
    path.write_bytes(b"x")
    sink = Record(path=str(path))
    sink.plan(live_spec())
    with pytest.raises(OutputError, match="exists already"):
        sink.open()
    with pytest.raises(InputError, match=r"\.mp4, \.mov or \.mkv"):
        Record(path="x.avi")
    missing = Record(path=str(tmp_path / "no" / "x.mkv"))
    missing.plan(live_spec())
    with pytest.raises(OutputError, match="does not exist"):
        missing.open()
    with pytest.raises(SpecError, match="even sizes"):
        Record(path="x.mkv").plan(live_spec(63, 48))


def test_a_server_that_is_not_there_is_one_line() -> None:
    sink = StreamOut(url="rtmp://127.0.0.1:1/live/secret")
    sink.plan(live_spec())
    with pytest.raises(OutputError, match=r"/live/\.\.\.': Connection refused") as caught:
        sink.open()
    assert "secret" not in str(caught.value)


def test_a_full_socket_holds_up_nobody_else(doubler: str) -> None:
    peer = Peer()
    feed, seen = Feed(live_spec(256, 256)), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    url = f"tcp://127.0.0.1:{peer.port}"
    sink = StreamOut(url=url, bitrate=500_000_000, timeout_s=1.0)
    graph.add("stuck", sink, "enhance")
    graph.add("free", Callback(lambda f: seen.append(f.pts)), "enhance")
    live = Live(graph)
    live.start()
    number = 0
    end_s = time.perf_counter() + 30
    # Noise at a huge bit rate fills the socket's buffers within a second or two.
    while sink.state != "lost" and time.perf_counter() < end_s:
        feed.push()
        number += 1
        until(lambda n=number: len(seen) >= n, 5)  # type: ignore[misc]
    assert sink.state == "lost"
    assert live.state()["sinks"]["free"]["frames"] == number
    feed.end()
    live.stop()
    peer.close()


def test_a_stream_that_is_cut_is_connected_again(doubler: str) -> None:
    peer = Peer()
    peer.reading.set()
    feed = Feed(live_spec())
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", "stream", "enhance", url=f"tcp://127.0.0.1:{peer.port}")
    live = Live(graph)
    live.start()

    def pushed(condition: Callable[[], Any]) -> None:
        def attempt() -> Any:
            feed.push()
            time.sleep(0.02)
            return condition()

        until(attempt)

    sink = live.sinks["out"]
    pushed(lambda: peer.received > 2000)
    peer.drop()
    pushed(lambda: sink.state == "lost")
    pushed(lambda: sink.state == "live" and peer.accepted)
    before = peer.received
    pushed(lambda: peer.received > before + 2000)
    feed.end()
    assert live.wait(20)
    states = [e["state"] for e in live.events() if e["event"] == "sink"]
    assert states[:2] == ["lost", "live"]
    assert live.pipeline.report().problems == []
    peer.close()


class FakeCamera:
    """Stands in for pyvirtualcam.Camera, whose driver test machines do not have."""

    sent: list[Any] = []  # noqa: RUF012

    def __init__(self, width: int, height: int, fps: float, *, fmt: str, device: Any) -> None:
        if device == "busy":
            raise RuntimeError("device is in use\nmore")
        self.arguments = (width, height, fps, fmt)
        self.closed = False

    def send(self, picture: Any) -> None:
        assert not self.closed
        FakeCamera.sent.append((self.arguments, picture.copy()))

    def close(self) -> None:
        self.closed = True


def test_a_virtual_camera_gets_the_planes_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = SimpleNamespace(Camera=FakeCamera, PixelFormat=SimpleNamespace(I420="I420", NV12="NV12"))
    monkeypatch.setitem(sys.modules, "pyvirtualcam", fake)
    FakeCamera.sent.clear()
    sink = VirtualCamera()
    sink.plan(live_spec())
    sink.open()
    frame = pattern(live_spec(), 1)
    sink.write(frame)
    sink.replan(live_spec(32, 32))
    sink.write(pattern(live_spec(32, 32), 2))
    sink.close()
    (first, data), (second, _) = FakeCamera.sent
    assert first == (64, 48, 25.0, "I420")
    assert second == (32, 32, 25.0, "I420")
    assert data.tobytes() == b"".join(p.tobytes() for p in frame.planes)
    assert packed(frame).shape == (64 * 48 * 3 // 2,)
    busy = VirtualCamera(device="busy")
    busy.plan(live_spec())
    with pytest.raises(OutputError, match="no virtual camera: device is in use"):
        busy.open()


def test_a_virtual_camera_that_is_lost_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [False]

    class Camera(FakeCamera):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if taken[0]:
                raise RuntimeError("cannot set the size: device is busy")
            super().__init__(*arguments, **options)

        def send(self, picture: Any) -> None:
            if taken[0]:
                raise OSError("the device is gone")
            super().send(picture)

    fake = SimpleNamespace(Camera=Camera, PixelFormat=SimpleNamespace(I420="I420", NV12="NV12"))
    monkeypatch.setitem(sys.modules, "pyvirtualcam", fake)
    FakeCamera.sent.clear()
    events: list[dict[str, Any]] = []
    sink, frame = VirtualCamera(), pattern(live_spec(), 1)
    sink.name, sink.clock, sink.notify = "camera", ManualClock(), events.append
    sink.plan(live_spec())
    sink.open()
    sink.write(frame)
    taken[0] = True
    sink.write(frame)
    sink.replan(live_spec(32, 32))  # a reader holds it to its first size
    taken[0] = False
    small = pattern(live_spec(32, 32), 2)
    sink.write(small)
    assert sink.state == "lost"  # not yet tried again
    sink.clock.advance(1)
    sink.write(small)
    sink.close()
    assert [(e["state"], e.get("reason")) for e in events] == [
        ("lost", "no virtual camera: the device is gone"),
        ("live", None),
    ]
    assert [arguments[:2] for arguments, _ in FakeCamera.sent] == [(64, 48), (32, 32)]
    assert (sink.state, sink.drops) == ("live", {"lost": 2})


def test_without_pyvirtualcam_the_line_to_install_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    sink = VirtualCamera()
    sink.plan(live_spec())
    with pytest.raises(MissingExtraError, match=r"vidpipe\[live\]"):
        sink.open()


def test_the_real_pyvirtualcam_without_a_device_is_one_line() -> None:
    pytest.importorskip("pyvirtualcam")
    if any(Path("/dev").glob("video*")) or sys.platform != "linux":
        pytest.skip("this machine may have a virtual camera")
    sink = VirtualCamera()
    sink.plan(live_spec())
    with pytest.raises(OutputError, match="v4l2loopback"):
        sink.open()


def test_an_old_pyav_is_warned_of_where_an_output_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidpipe.live.outputs._OLD_PYAV", True)
    events: list[dict[str, Any]] = []
    for url in (f"tcp://127.0.0.1:{free_port()}", f"udp://127.0.0.1:{free_port()}"):
        sink = StreamOut(url=url)
        sink.notify, sink.name = events.append, url[:3]
        sink.plan(spec())
        with suppress(OutputError):
            sink.open()
        sink.close()
    assert [(e["event"], e["sink"]) for e in events] == [("warning", "tcp")]
    assert "all stops while this output connects" in events[0]["reason"]
