"""Live graphs that run: real files, real sockets, sinks that stall, sources that go away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import modelgen
import numpy as np
import pytest

from vidpipe.errors import InputError, MediaError, MissingExtraError, OutputError, SpecError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.live.capture import Capture, Frames
from vidpipe.live.enhance import Enhance, Enhanced
from vidpipe.live.outputs import Callback, Record, StreamOut
from vidpipe.live.session import Live
from vidpipe.live.virtualcam import VirtualCamera, packed
from vidpipe.model.stage import Model
from vidpipe.testing import ManualClock, pattern, spec

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that repeats every pixel, so that its pictures are known."""
    path = str(modelgen.nearest(tmp_path_factory.mktemp("models") / "doubler.onnx", 2))
    model = Model(model=path)  # ONNX Runtime opens files of its own at its first session
    model.plan(spec())
    model.open()
    model.close()
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(modelgen.random_net(tmp_path_factory.mktemp("models") / "other.onnx", 2))


def until(condition: Callable[[], Any], patience_s: float = 20.0) -> Any:
    """Wait for something that other threads bring about."""
    end_s = time.perf_counter() + patience_s
    while time.perf_counter() < end_s:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def live_spec(width: int = 64, height: int = 48) -> FrameSpec:
    return FrameSpec(
        width=width,
        height=height,
        format=spec().format,
        time_base=Fraction(1, 90000),
        rate=Fraction(25),
    )


class Feed:
    """Pictures from a test, as fast as it lets them through."""

    def __init__(self, first: FrameSpec) -> None:
        self.spec = first
        self.pts = 0
        self._queue: list[Frame] = []
        self._changed = threading.Condition()
        self._ended = False

    def push(self, count: int = 1, at: FrameSpec | None = None, value: int | None = None) -> None:
        with self._changed:
            for _ in range(count):
                frame = pattern(at or self.spec, self.pts)
                if value is not None:
                    frame.planes = tuple(np.full_like(p, value) for p in frame.planes)
                self._queue.append(frame)
                self.pts += 3600
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended, timeout=30)
                if not self._queue:
                    return
                frame = self._queue.pop(0)
            yield frame


def open_stage(stage: Enhance, first: FrameSpec, clock: ManualClock | None = None) -> Enhance:
    stage.clock = clock or ManualClock()
    stage.plan(first)
    stage.open()
    return stage


def one(stage: Enhance, frame: Frame) -> Enhanced:
    (out,) = stage.process(frame)
    assert isinstance(out, Enhanced)
    return out


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# The enhance stage


def test_the_enhance_stage_gives_the_models_own_pictures(doubler: str) -> None:
    stage = open_stage(Enhance(tiers=[doubler], latency_budget_s=5), spec())
    frame = pattern(spec(), 3)
    frame.captured_s = 1.5
    out = one(stage, frame)
    model = Model(model=doubler)
    model.plan(spec())
    model.open()
    (wanted,) = model.process(frame)
    assert same(out.planes, wanted.planes)
    assert (out.pts, out.captured_s, out.before) == (frame.pts, 1.5, frame)
    model.close()
    stage.close()


def test_controls_act_from_the_next_frame_on(doubler: str, other: str) -> None:
    stage = open_stage(Enhance(tiers=[other, doubler], latency_budget_s=5), spec())
    frame = pattern(spec(), 1)
    best = one(stage, frame).planes
    stage.controls.change({"tier": doubler})
    double = one(stage, frame).planes
    assert not same(best, double)
    stage.controls.change({"tier": "scale"})
    plain = one(stage, frame).planes
    stage.controls.change({"tier": other, "enabled": False})
    assert same(one(stage, frame).planes, plain)
    stage.controls.change({"enabled": True, "strength": 0.0})
    assert same(one(stage, frame).planes, plain)
    stage.controls.change({"strength": 1.0, "wipe": 0.5})
    wiped = one(stage, frame).planes
    assert np.array_equal(wiped[0][:, :63], plain[0][:, :63])
    assert np.array_equal(wiped[0][:, 65:], best[0][:, 65:])
    stage.controls.change({"wipe": None, "frozen": True})
    held = one(stage, frame)
    later = one(stage, pattern(spec(), 9))
    assert same(later.planes, held.planes)
    assert later.pts == 9
    stage.close()


def test_a_models_own_strength_is_set(tmp_path: Path) -> None:
    path = Path("vidpipe/models/clean-2x-nano.onnx")
    if not path.is_file():
        pytest.skip("the built-in models are not there")
    stage = open_stage(Enhance(tiers=[str(path)], latency_budget_s=5, strength=0.25), spec())
    one(stage, pattern(spec(), 1))
    assert stage.models[0].strength == 0.25
    stage.controls.change({"strength": 0.5})
    one(stage, pattern(spec(), 1))
    assert stage.models[0].strength == 0.5
    stage.close()


def test_tiers_must_agree_and_the_budget_must_make_sense(doubler: str, tmp_path: Path) -> None:
    triple = str(modelgen.nearest(tmp_path / "triple.onnx", 3))
    with pytest.raises(SpecError, match=r"tier '.*triple\.onnx' makes 192x144"):
        Enhance(tiers=[doubler, triple]).plan(spec())
    with pytest.raises(InputError, match="latency budget"):
        Enhance(tiers=[doubler], latency_budget_s=0)
    with pytest.raises(InputError, match="Known: auto"):
        Enhance(tiers=[doubler], tier="best")


def test_the_stage_steps_down_at_once_and_says_so(doubler: str, other: str) -> None:
    clock = ManualClock(10.0)
    stage = open_stage(Enhance(tiers=[other, doubler], latency_budget_s=0.05), spec(), clock)
    events: list[dict[str, Any]] = []
    stage.notify = events.append
    stage.name = "enhance"
    for number in range(3):
        in_time = pattern(spec(), number)
        in_time.captured_s = clock.now_s()
        one(stage, in_time)
    assert stage.tier == other
    for number in (3, 4):
        late = pattern(spec(), number)
        late.captured_s = clock.now_s() - 0.2
        one(stage, late)
    assert stage.tier == doubler
    on_time = pattern(spec(), 5)
    on_time.captured_s = clock.now_s()
    one(stage, on_time)
    assert [(e["event"], e["from"], e["to"]) for e in events] == [("tier", other, doubler)]
    assert "budget 50 ms" in events[0]["reason"]
    stage.controls.change({"tier": other})
    one(stage, pattern(spec(), 6))
    assert (events[-1]["to"], events[-1]["reason"]) == (other, "chosen")
    assert len(events) == 2
    stage.close()


def test_kept_pictures_stay_what_they_were(doubler: str) -> None:
    stage = open_stage(Enhance(tiers=[doubler], latency_budget_s=5), spec())
    kept = [one(stage, pattern(spec(), n)) for n in range(8)]
    copies = [[p.copy() for p in k.planes] for k in kept]
    for n in range(8, 20):
        one(stage, pattern(spec(), n))
    for frame, copy in zip(kept, copies, strict=True):
        assert same(frame.planes, tuple(copy))
    stage.close()


# Whole graphs


def test_the_latest_frame_wins_and_every_drop_is_counted(doubler: str) -> None:
    feed, gate, seen = Feed(live_spec()), threading.Event(), []

    def slow(frame: Frame) -> None:
        seen.append(frame.pts)
        gate.wait(20)

    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(slow), "enhance")
    live = Live(graph)
    live.start()
    feed.push(40)
    until(lambda: live.pipeline.progress()[0].frames_out == 40)
    gate.set()
    feed.end()
    assert live.wait(20)
    report = live.pipeline.report()
    assert report.problems == []
    assert seen[-1] == 39 * 3600
    dropped = sum(s.dropped for s in report.stages)
    assert len(seen) + dropped == 40
    assert dropped > 20


def test_a_stalled_sink_does_not_hold_up_the_others(doubler: str) -> None:
    feed, gate, seen = Feed(live_spec()), threading.Event(), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("stuck", Callback(lambda _f: gate.wait(30)), "enhance")
    graph.add("free", Callback(lambda f: seen.append(f.pts)), "enhance")
    live = Live(graph)
    live.start()
    for number in range(30):
        feed.push()
        until(lambda n=number: len(seen) > n)
    state = live.state()["sinks"]
    assert state["free"]["frames"] == 30
    assert state["stuck"]["frames"] == 0
    assert state["stuck"]["drops"]["behind"] == 28  # one in its hands, one on the link
    gate.set()
    feed.end()
    assert live.wait(20)


def test_a_new_size_is_planned_without_a_restart(doubler: str, tmp_path: Path) -> None:
    feed, sizes = Feed(live_spec()), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(lambda f: sizes.append((f.spec.width, f.spec.height))), "enhance")
    graph.add("record", "record", "enhance", path=str(tmp_path / "r.mkv"))
    live = Live(graph)
    live.start()
    for count, size in enumerate([(64, 48), (96, 64), (64, 48)], 1):
        feed.push(1, live_spec(*size))
        until(lambda c=count: len(sizes) == c)
        until(lambda c=count: live.sinks["record"].measure(live.clock).read().frames == c)
    feed.end()
    assert live.wait(20)
    assert live.pipeline.report().problems == []
    assert sizes == [(128, 96), (192, 128), (128, 96)]
    with av.open(str(tmp_path / "r.mkv")) as file:
        assert [(f.width, f.height) for f in file.decode(video=0)] == 3 * [(128, 96)]


def test_latency_is_measured_from_capture_to_each_sink() -> None:
    clock = ManualClock(100.0)
    sink = Callback(lambda _frame: clock.advance(0.04))
    sink.clock = clock
    for number in range(10):
        frame = pattern(live_spec(), number)
        frame.captured_s = clock.now_s() - 0.01
        sink.write(frame)
    reading = sink.measure(clock).read()
    assert reading.p50_s == reading.p99_s == pytest.approx(0.05)
    assert sink.report()["frames"] == 10


# Capture


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


def test_a_file_that_is_not_looped_ends(tmp_path: Path) -> None:
    path = clock_and_beep(tmp_path / "clip.mkv", seconds=1)
    capture = Capture(address=str(path), loop=False)
    capture.plan()
    assert sum(1 for _ in capture.frames()) + capture.overwritten == 25
    capture.close()
    assert capture.report()["losses"] == 0


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


class Sender:
    """Another program that sends MPEG-TS over UDP."""

    def __init__(self, port: int) -> None:
        self.url = f"udp://127.0.0.1:{port}?pkt_size=1316"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _send(self) -> None:
        with av.open(self.url, "w", format="mpegts") as out:
            stream: Any = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.options = {"tune": "zerolatency", "g": "5"}
            number = 0
            while not self._stop.wait(0.02):
                frame = av.VideoFrame.from_ndarray(
                    np.full((72, 64), number % 200 + 20, np.uint8), "yuv420p"
                )
                frame.pts = number
                number += 1
                out.mux(stream.encode(frame))


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


# Recording and streaming


def clock_and_beep(path: Path, *, seconds: int = 3) -> Path:
    """A clip of 25 fps: brightness tells the frame within its second, a beep comes at 12/25 s."""
    with av.open(str(path), "w") as file:
        video: Any = file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.options = {"tune": "zerolatency", "g": "5", "crf": "10"}
        audio: Any = file.add_stream("pcm_s16le", rate=48000)
        audio.codec_context.layout = "stereo"
        tone = np.sin(np.arange(1920) * 2 * np.pi * 1000 / 48000) * 20000
        for number in range(seconds * 25):
            data = np.full((96, 96), 128, np.uint8)
            data[:64] = 16 + 8 * (number % 25)
            frame = av.VideoFrame.from_ndarray(data, "yuv420p")
            frame.pts = number
            file.mux(video.encode(frame))
            samples = (tone if number % 25 in (12, 13) else 0 * tone).astype(np.int16)
            heard = av.AudioFrame.from_ndarray(
                np.repeat(samples, 2)[None, :].copy(), "s16", "stereo"
            )
            heard.sample_rate = 48000
            heard.pts = number * 1920
            file.mux(audio.encode(heard))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))
    return path


def sound_after_picture(container: Any) -> list[float]:
    """How much later than the picture each beep of a `clock_and_beep` is, in seconds."""
    pictures: list[float] = []
    beeps: list[float] = []
    quiet_since = -1.0
    for packet in container.demux():
        if packet.stream.type not in ("video", "audio"):
            continue
        for frame in packet.decode():
            if packet.stream.type == "video":
                number = round((frame.to_ndarray()[: frame.height].mean() - 16) / 8)
                pictures.append(float(frame.time) - number / 25)
                continue
            samples = np.abs(frame.to_ndarray()).max(axis=0)
            for index in np.flatnonzero(samples > 0.1):
                time_s = float(frame.time) + index / frame.sample_rate
                if time_s - quiet_since > 0.2:
                    beeps.append(time_s - 12 / 25)
                quiet_since = time_s
    assert len(pictures) > 25
    # Seconds begin at these moments, for the eye and for the ear.
    return [float(np.median([(b - p + 0.5) % 1 - 0.5 for p in pictures])) for b in beeps]


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
    listener = _Received(port)
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


class _Received:
    """All datagrams that come to a port."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind(("127.0.0.1", port))
        self._socket.settimeout(0.2)
        self._stop = threading.Event()
        self._data = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._data += self._socket.recv(65536)
            except TimeoutError:
                continue

    def stop(self) -> bytes:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        return bytes(self._data)


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


class Peer:
    """A TCP server that accepts, and reads only when told."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.accepted: list[socket.socket] = []
        self.received = 0
        self.reading = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.server.settimeout(0.05)
        while not self._stop.is_set():
            try:
                self.accepted.append(self.server.accept()[0])
                self.accepted[-1].settimeout(0.05)
            except TimeoutError:
                pass
            if self.reading.is_set():
                for peer in self.accepted:
                    try:
                        self.received += len(peer.recv(65536))
                    except OSError:
                        continue

    def drop(self) -> None:
        for peer in self.accepted:
            peer.close()
        self.accepted.clear()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.drop()
        self.server.close()


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
        until(lambda n=number: len(seen) >= n, 5)
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


# Virtual camera


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


# The session


def test_snapshots_are_the_picture_before_and_after(doubler: str, tmp_path: Path) -> None:
    feed, seen = Feed(live_spec()), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(seen.append), "enhance")
    live = Live(graph, snapshots=tmp_path)
    live.start()
    with pytest.raises(InputError, match="no picture yet"):
        live.snapshot()
    live.control({"wipe": 0.5})
    feed.push(value=100)
    until(lambda: seen)
    first = live.snapshot()
    second = live.snapshot("enhance")
    assert len({*first.values(), *second.values()}) == 4
    with av.open(first["before"]) as file:
        before = next(file.decode(video=0))
    with av.open(first["after"]) as file:
        after = next(file.decode(video=0))
    assert (before.width, before.height, after.width, after.height) == (64, 48, 128, 96)
    small, large = (f.to_ndarray(format="rgb24").astype(int) for f in (before, after))
    assert np.ptp(small, axis=(0, 1)).max() <= 1
    assert np.ptp(large, axis=(0, 1)).max() <= 1  # no line: the snapshot has no wipe in it
    assert np.abs(large[0, 0] - small[0, 0]).max() <= 1
    # BT.601, limited range, Y = Cb = Cr = 100
    assert np.abs(small[0, 0] - [53, 132, 41]).max() <= 3
    assert live.snapshot_bytes("after") == Path(second["after"]).read_bytes()
    with pytest.raises(InputError, match="Did you mean 'enhance'"):
        live.control({"enabled": True}, "enhanse")
    feed.end()
    assert live.wait(20)
    kinds = [e["event"] for e in live.events()]
    assert kinds == ["control", "snapshot", "snapshot"]


def test_two_filters_in_one_graph_are_controlled_one_by_one(doubler: str) -> None:
    feeds = [Feed(live_spec()), Feed(live_spec(32, 32))]
    seen: list[list[Frame]] = [[], []]
    graph = Graph()
    for number, feed in enumerate(feeds):
        graph.add(f"in{number}", Frames(feed.spec, feed))
        graph.add(f"f{number}", "enhance", f"in{number}", tiers=[doubler], latency_budget_s=5.0)
        graph.add(f"out{number}", Callback(seen[number].append), f"f{number}")
    live = Live(graph)
    live.start()
    live.control({"enabled": False}, "f1")
    for feed in feeds:
        feed.push()
    until(lambda: seen[0] and seen[1])
    state = live.state()
    assert state["filters"]["f0"]["enabled"]
    assert not state["filters"]["f1"]["enabled"]
    assert state["filters"]["f1"]["source"] == "in1"
    assert state["sinks"]["out1"]["filter"] == "f1"
    assert state["filters"]["f0"]["provider"] == "cpu (CPUExecutionProvider)"
    for feed in feeds:
        feed.end()
    assert live.wait(20)
