"""Every protocol in and out, between two filters on this machine."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from livekit import Levels, chain, clock_and_beep, free_port, until

from vidpipe.errors import InputError, VidpipeError
from vidpipe.live.outputs import StreamOut
from vidpipe.live.session import Live

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(clock_and_beep(tmp_path_factory.mktemp("clip") / "clip.mkv", seconds=4))


@contextmanager
def sending(clip: str, url: str, **options: Any) -> Iterator[Live]:
    live = chain({"address": clip}, {"url": url, "options": options})
    live.start()
    try:
        yield live
    finally:
        live.stop()


def received(address: str, **options: str) -> None:
    """Watch an address until its pictures are frames of the clip, with sound."""
    levels = Levels()

    def started() -> Live | None:
        live = chain({"address": address, "options": options}, levels.sink)
        with suppress(VidpipeError):
            live.start()
            return live
        return None

    live = until(started)
    try:
        until(levels.moving)
        assert live.sources["in"].has_sound
        assert live.sources["in"].losses == 0
    finally:
        live.stop()


@pytest.mark.parametrize("scheme", ["udp", "rtp"])
def test_datagrams(clip: str, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}"
    with sending(clip, url) as sender:
        received(url)
        assert sender.sinks["out"].state == "live"
        assert not sender.sinks["out"].drops


OLD = int(av.__version__.partition(".")[0]) < 19


@pytest.mark.skipif(not OLD, reason="newer PyAV can")
def test_an_old_pyav_cannot_wait_for_whoever_connects() -> None:
    with pytest.raises(InputError, match=r"needs PyAV 19, this is 18"):
        StreamOut(url="http://127.0.0.1:1", options={"listen": "1"})


# PyAV before 19 connects with the interpreter's lock held: not to a peer in the same process.
alone = pytest.mark.skipif(OLD, reason="PyAV before 19 cannot")


@alone
@pytest.mark.parametrize("scheme", ["tcp", "http"])
def test_a_stream_for_whoever_connects(clip: str, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}"
    with sending(clip, url, listen="1") as sender:
        until(lambda: sender.sinks["out"].drops.get("waiting"))
        received(url)
        until(lambda: sender.sinks["out"].state == "waiting")
        received(url)
    assert [e["state"] for e in sender.events()][:3] == ["live", "waiting", "live"]


@alone
@pytest.mark.parametrize(
    ("scheme", "options"), [("rtsp", {"listen_timeout": "10"}), ("rtmp", {"listen": "1"})]
)
def test_a_source_that_waits_to_be_sent_to(clip: str, scheme: str, options: dict[str, str]) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}/live/test"
    receiver = threading.Thread(target=received, args=(url,), kwargs=options)
    receiver.start()
    while receiver.is_alive():
        with suppress(VidpipeError), sending(clip, url) as sender:
            until(lambda live=sender: live.pipeline.error or not receiver.is_alive())
    receiver.join()


class Relay(http.server.BaseHTTPRequestHandler):
    """What comes in by POST goes out to the GET that waits for it."""

    protocol_version = "HTTP/1.1"
    watcher: Any = None
    watched = threading.Event()
    ended = threading.Event()

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        assert self.headers["Transfer-Encoding"] == "chunked"
        while size := int(self.rfile.readline(), 16):
            data = self.rfile.read(size)
            self.rfile.readline()
            if Relay.watcher is not None:
                with suppress(OSError):
                    Relay.watcher.write(data)
        self.close_connection = True
        Relay.ended.set()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        Relay.watcher = self.wfile
        Relay.ended.wait(60)
        Relay.watcher = None


@alone
def test_http_to_a_server_and_from_it(clip: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/live.ts"
    try:
        with sending(clip, url) as sender:
            received(url)
            assert sender.sinks["out"].state == "live"
    finally:
        Relay.ended.set()
        server.shutdown()
        server.server_close()


def test_a_picture_file_is_shown_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "still.png"
    with av.open(str(path), "w", format="image2") as out:
        stream: Any = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        picture = np.full((48, 64, 3), 200, np.uint8)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))
    levels = Levels()
    live = chain({"address": str(path)}, levels.sink)
    live.start()
    until(lambda: len(levels.seen) > 5)
    report = live.stop()
    assert report is not None
    assert set(levels.seen) <= {21, 22}  # 200 in full range is 188 in limited range
    assert live.sources["in"].losses == 0
