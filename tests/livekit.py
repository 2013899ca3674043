"""What the tests of the live filter share: feeds, peers, and clips whose sound can be checked."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.live.enhance import Enhance, Enhanced
from vidpipe.live.outputs import Callback
from vidpipe.live.session import Live
from vidpipe.testing import pattern, spec

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def one(stage: Enhance, frame: Frame) -> Enhanced:
    """Return what an open stage makes of one frame."""
    (out,) = stage.process(frame)
    assert isinstance(out, Enhanced)
    return out


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


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


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


def clock_and_beep(path: Path, *, seconds: int = 3, b_frames: int = 0) -> Path:
    """A clip of 25 fps: brightness tells the frame within its second, a beep comes at 12/25 s."""
    options = {"g": "50", "bf": str(b_frames)} if b_frames else {"tune": "zerolatency", "g": "5"}
    with av.open(str(path), "w") as file:
        video: Any = file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.options = {**options, "crf": "10"}
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


class Received:
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


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextmanager
def running(*arguments: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends with the block, and its children with it."""
    process = subprocess.Popen(
        [str(a) for a in arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def keep(name: str, data: bytes) -> None:
    folder = os.environ.get("VIDPIPE_SHOTS")
    if folder:
        (Path(folder) / name).write_bytes(data)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def virtual_screen(size: str, *arguments: str) -> Iterator[str]:
    """Xvfb with a screen of 24 bits; gives its display's name."""
    xvfb = program("Xvfb")
    reader, writer = os.pipe()
    with (
        os.fdopen(reader) as pipe,
        running(
            xvfb, "-displayfd", str(writer), "-screen", "0", f"{size}x24", *arguments,
            pass_fds=[writer],
        ),
    ):  # fmt: skip
        os.close(writer)
        number = pipe.readline().strip()
        assert number, "Xvfb gave no display"
        yield f":{number}"


def chain(source: Any, sink: Any, **enhance: Any) -> Live:
    """A filter of three stages; a source or a sink is an actor, or options of its stage."""
    graph = Graph()
    if isinstance(source, dict):
        graph.add("in", "capture", **source)
    else:
        graph.add("in", source)
    graph.add("enhance", "enhance", "in", **{"tiers": [], "latency_budget_s": 5.0, **enhance})
    if isinstance(sink, dict):
        graph.add("out", sink.pop("use", "stream"), "enhance", **sink)
    else:
        graph.add("out", sink, "enhance")
    return Live(graph)


class Levels:
    """The brightness of the pictures that a filter gives, frames of a `clock_and_beep`."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.sink = Callback(self._take)

    def _take(self, frame: Frame) -> None:
        self.seen.append(round((float(frame.planes[0].mean()) - 16) / 8))

    def moving(self, count: int = 12) -> bool:
        """Whether the last pictures are frames of the clip, one after the other."""
        last = self.seen[-count:]
        steps = [(b - a) % 25 for a, b in itertools.pairwise(last)]
        return (
            len(last) == count
            and all(0 <= n < 25 for n in last)
            and all(s in (1, 2) for s in steps)
        )
