"""With real servers and a real screen on the other side.

Skipped where the program is not installed; `.ci/packages` names the Debian packages.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import av
import modelgen
import numpy as np
import pytest
from livekit import (
    Levels,
    chain,
    clock_and_beep,
    free_port,
    listens,
    program,
    running,
    sound_after_picture,
    until,
    virtual_screen,
)

from vidpipe.graph import Graph
from vidpipe.live.outputs import Callback
from vidpipe.live.session import Live

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that doubles the picture and darkens it, so that before and after differ."""
    path = tmp_path_factory.mktemp("models") / "dark.onnx"
    net = modelgen.Net().conv(np.full((4, 1, 1, 1), 0.6))
    net.add("DepthToSpace", blocksize=2, mode="CRD").save(path)
    return str(path)


@pytest.fixture
def rtmp(tmp_path: Path) -> Iterator[int]:
    """The port of nginx with its RTMP module."""
    nginx = program("nginx")
    module = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
    if not module.is_file():
        pytest.skip("nginx has no RTMP module")
    port = free_port()
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"load_module {module};\ndaemon off;\nmaster_process off;\n"
        f"pid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n"
        f"rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ "
        f"live on; record all; record_path {tmp_path}; }} }} }}\n"
    )
    with running(nginx, "-c", config, "-p", tmp_path, "-e", f"{tmp_path}/error.log"):
        until(lambda: listens(port))
        yield port


def test_through_a_real_rtmp_server_and_back(rtmp: int, sample: Path, doubler: str) -> None:
    url = f"rtmp://127.0.0.1:{rtmp}/live/test"
    sender = Graph().add("in", "capture", address=str(sample))
    sender.add("enhance", "enhance", "in", tiers=[doubler], tier=doubler)
    sender.add("out", "stream", "enhance", url=url, preset="ultrafast")
    relay = Live(sender)
    relay.start()
    until(lambda: relay.state()["sinks"]["out"]["frames"] > 30)
    seen: list[Any] = []
    receiver = Graph().add("in", "capture", address=url)
    receiver.add("enhance", "enhance", "in", tiers=[], latency_budget_s=5.0)
    receiver.add("out", Callback(lambda f: seen.append(f.planes[0].mean())), "enhance")
    watcher = Live(receiver)
    watcher.start()
    until(lambda: len(seen) > 50)
    source = watcher.sources["in"]
    assert source.has_sound
    assert watcher.pipeline.specs["in"].width == 1280
    with av.open(str(sample)) as file:
        original = next(file.decode(video=0)).to_ndarray(format="gray").mean()
    assert np.mean(seen) < 0.8 * original  # the darkened picture
    relay.stop()
    until(lambda: source.state == "lost" or source.repeated)
    watcher.stop()


def test_sound_stays_with_the_picture_through_an_rtmp_server(
    rtmp: int, doubler: str, tmp_path: Path
) -> None:
    clip = clock_and_beep(tmp_path / "clip.mkv", seconds=4)
    url = f"rtmp://127.0.0.1:{rtmp}/live/beep"
    live = chain({"address": str(clip), "loop": False}, {"url": url}, tiers=[doubler], tier="scale")
    live.start()
    assert live.wait(30)
    assert live.pipeline.report().problems == []
    until(lambda: list(tmp_path.glob("beep*.flv")))
    (recording,) = tmp_path.glob("beep*.flv")
    until(lambda: whole(recording))
    with av.open(str(recording)) as file:
        late_s = sound_after_picture(file)
    assert len(late_s) >= 2
    assert max(abs(d) for d in late_s) <= 0.04, late_s


def whole(recording: Path) -> bool:
    """Whether a recording of three seconds or more has come to its end."""
    try:
        with av.open(str(recording)) as file:
            return sum(1 for _ in file.decode(video=0)) >= 85
    except OSError:
        return False


# RTSP

RtspServer = Callable[[], AbstractContextManager[Any]]


@pytest.fixture
def rtsp(tmp_path: Path) -> tuple[str, RtspServer]:
    """The URL of GStreamer's RTSP server, and what starts it on its port."""
    python = "/usr/bin/python3"
    imports = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if not Path(python).exists() or subprocess.run([python, "-c", imports], stderr=-3).returncode:
        pytest.skip("GStreamer's RTSP server is not installed")
    clip = clock_and_beep(tmp_path / "clip.mkv", seconds=60)
    port = free_port()
    script = Path(__file__).parent / "rtsp_server.py"

    def start() -> AbstractContextManager[Any]:
        return running(python, script, str(port), clip, tmp_path / "sent.mkv")

    return f"rtsp://127.0.0.1:{port}", start


def answers(url: str) -> bool:
    return listens(int(url.rpartition(":")[2]))


@pytest.mark.parametrize("lost", ["hold", "slate"])
def test_a_real_rtsp_server_that_is_killed_and_comes_back(
    rtsp: tuple[str, RtspServer], lost: str
) -> None:
    url, start = rtsp
    levels = Levels()
    with start():
        until(lambda: answers(url))
        live = chain({"address": f"{url}/play", "lost": lost}, levels.sink)
        live.start()
        source = live.sources["in"]
        assert source.has_sound
        until(levels.moving)
    until(lambda: source.state == "lost")
    until(lambda: source.repeated > 3)
    until(lambda: len(set(levels.seen[-3:])) == 1)
    shown = levels.seen[-1]
    # A picture of the clip, or the slate: 40 all over, with a bright edge.
    assert shown in (levels.seen[-5:] if lost == "hold" else (4, 5, 6))
    with start():
        until(lambda: source.state == "live")
        until(levels.moving)
        live.stop()
    states = [e["state"] for e in live.events() if e["event"] == "source"]
    assert states == ["lost", "live"]


def test_sound_and_picture_to_a_real_rtsp_server(
    rtsp: tuple[str, RtspServer], tmp_path: Path
) -> None:
    url, start = rtsp
    clip = clock_and_beep(tmp_path / "short.mkv", seconds=4)
    with start():
        until(lambda: answers(url))
        live = chain({"address": str(clip), "loop": False}, {"url": f"{url}/record"})
        live.start()
        assert live.wait(30)
        assert live.pipeline.report().problems == []
        until(lambda: whole(tmp_path / "sent.mkv"))
    with av.open(str(tmp_path / "sent.mkv")) as file:
        late_s = sound_after_picture(file)
    assert len(late_s) >= 2
    # FFmpeg's RTCP reports have no CNAME, so this server places sound and picture by their
    # arrival.
    assert max(abs(d) for d in late_s) <= 0.04, late_s


# The screen


def test_what_is_on_the_screen_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with virtual_screen("320x240", "-fbdir", str(tmp_path)) as display:
        # The screen is a file here, an X window dump; its last bytes are the pixels.
        pixels = np.memmap(tmp_path / "Xvfb_screen0", np.uint8, "r+")[-320 * 240 * 4 :]
        picture = pixels.reshape(240, 320, 4)
        picture[:] = (0, 0, 255, 0)  # blue, green, red, and nothing
        picture[100:, 160:] = (255, 0, 0, 0)
        monkeypatch.setenv("DISPLAY", display)
        seen: list[Any] = []
        address = {"address": "screen:160x120+80,40", "rate": 20.0, "options": {"draw_mouse": "0"}}
        live = chain(address, Callback(seen.append))
        live.start()
        try:
            until(lambda: len(seen) > 3)
            picture[:] = (255, 255, 255, 0)
            until(lambda: seen[-1].planes[0].min() > 230)
        finally:
            live.stop()
    y, cb, cr = (p.astype(int) for p in seen[0].planes)
    assert y.shape == (120, 160)
    red, blue = (81, 90, 240), (41, 240, 110)  # BT.601, limited range
    for row, column, wanted in ((5, 5, red), (5, 150, red), (110, 5, red), (110, 150, blue)):
        found = (y[row, column], cb[row // 2, column // 2], cr[row // 2, column // 2])
        assert np.abs(np.subtract(found, wanted)).max() <= 3
    assert y[70, 70] > 60 > y[70, 90]  # the corner lies where it was drawn


def test_no_screen_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidpipe.errors import VidpipeError

    monkeypatch.setenv("DISPLAY", ":4321")
    with pytest.raises(VidpipeError, match=r"screen|source ':4321'") as caught:
        chain({"address": "screen"}, Callback(print)).start()
    assert "\n" not in str(caught.value)
