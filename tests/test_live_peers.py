"""With real programs on the other side: an RTMP server, a browser, OBS.

Each test is skipped where its program is not installed; `.ci/packages` names the Debian
packages. VIDPIPE_SHOTS may name a folder to keep the screenshots in.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import modelgen
import numpy as np
import pytest
from test_live_run import free_port, until

from vidpipe.graph import Graph
from vidpipe.live.outputs import Callback
from vidpipe.live.session import Live

httpx = pytest.importorskip("httpx")

SIGN = "return document.getElementById('sign').textContent"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


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


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that doubles the picture and darkens it, so that before and after differ."""
    path = tmp_path_factory.mktemp("models") / "dark.onnx"
    net = modelgen.Net().conv(np.full((4, 1, 1, 1), 0.6))
    net.add("DepthToSpace", blocksize=2, mode="CRD").save(path)
    return str(path)


# RTMP


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
        f"rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ live on; }} }} }}\n"
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


# The page in a browser


class Browser:
    """Headless Chromium through its driver's HTTP interface (W3C WebDriver)."""

    def __init__(self, port: int, profile: Path, width: int, height: int, dark: bool) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        switches = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
        ]  # fmt: skip
        if dark:
            switches.append("--blink-settings=preferredColorScheme=0")
        options = {"args": switches, "binary": shutil.which("chromium", path=PATH)}
        if width < 500:
            options["mobileEmulation"] = {
                "deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}
            }
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        answer = self._http.post("/session", json={"capabilities": wanted}).json()["value"]
        self._session = f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, self._session + path, json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(answer["message"])
        return answer

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def shot(self, name: str) -> np.ndarray[Any, Any]:
        data = base64.b64decode(self.call("GET", "/screenshot"))
        keep(name, data)
        with av.open(io.BytesIO(data), format="png_pipe") as file:
            return next(file.decode(video=0)).to_ndarray(format="rgb24")

    def element(self, selector: str) -> str:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return str(next(iter(found.values())))

    def press(self, selector: str, keys: str) -> None:
        self.call("POST", f"/element/{self.element(selector)}/value", {"text": keys})

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.element(selector)}/click", {})


@pytest.fixture
def page(sample: Path, doubler: str, tmp_path: Path) -> Iterator[tuple[Live, str]]:
    pytest.importorskip("starlette")
    from vidpipe.live.server import Server

    graph = Graph().add("in", "capture", address=str(sample))
    graph.add("enhance", "enhance", "in", tiers=[doubler], tier=doubler)
    graph.add("page", "page", "enhance")
    live = Live(graph, snapshots=tmp_path)
    server = Server(live, port=0, token="open sesame")
    live.start()
    server.start()
    yield live, server.url.replace(" ", "%20")
    server.stop()
    live.stop()


@pytest.mark.parametrize(
    ("name", "width", "height", "dark"),
    [("wide", 1400, 900, False), ("phone", 390, 844, True)],
)
def test_the_page_in_a_real_browser(
    page: tuple[Live, str], tmp_path: Path, name: str, width: int, height: int, dark: bool
) -> None:
    program("chromium")
    driver = program("chromedriver")
    live, url = page
    port = free_port()
    with running(driver, f"--port={port}"):
        until(lambda: listens(port))
        browser = Browser(port, tmp_path / "profile", width, height, dark)
        browser.call("POST", "/url", {"url": url})
        assert "sesame" not in browser.run("return location.href")
        until(lambda: browser.run("return travel.pictures > 0 && shown !== null"))
        until(lambda: browser.run("return history_.length > 8"))
        sign = browser.run(SIGN)
        assert sign == "active: dark"
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        background = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(15, 18, 22)" if dark else "rgb(244, 245, 247)")

        def brightness() -> tuple[float, float]:
            """Mean of the left and the right part of the canvas."""
            left, right = browser.run(
                "const c = document.getElementById('picture'), p = c.getContext('2d');"
                "const mean = (x) => { const d = p.getImageData(x, 0, 100, c.height).data;"
                "  let s = 0; for (let i = 0; i < d.length; i += 4) s += d[i + 1];"
                "  return 4 * s / d.length; };"
                "return [mean(c.width * 0.2 | 0), mean(c.width * 0.6 | 0)];"
            )
            return left, right

        live.control({"frozen": True})
        time.sleep(0.5)
        left, right = brightness()
        browser.shot(f"page-{name}.png")
        # The slider by keyboard: all the way to the left, then a quarter of the way.
        browser.press("#slider", "\ue011")  # Home
        until(lambda: browser.run("return split === 0"))
        until(lambda: brightness()[0] < left - 20)  # what was before is now after
        browser.press("#slider", "\ue010")  # End
        until(lambda: browser.run("return split === 1"))
        until(lambda: brightness()[1] > right + 20)
        # And by pointer, on the picture itself.
        browser.run("document.getElementById('picture').scrollIntoView()")
        box = browser.run(
            "const b = document.getElementById('picture').getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height];"
        )
        moves = [
            {"type": "pointerMove", "x": round(box[0] + part * box[2]), "y": round(box[1] + 9)}
            for part in (0.9, 0.3)
        ]
        down, up = ({"type": t, "button": 0} for t in ("pointerDown", "pointerUp"))
        actions = [moves[0], down, moves[1], up]
        browser.call(
            "POST", "/actions",
            {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]},
        )  # fmt: skip
        until(lambda: abs(browser.run("return split") - 0.3) < 0.02)
        live.control({"frozen": False})

        browser.run(
            "const t = document.getElementById('tier'); t.value = 'scale';"
            "t.dispatchEvent(new Event('change'))"
        )
        until(lambda: live.filters["enhance"].controls.settings.tier == "scale")
        until(lambda: "only scaling" in browser.run(SIGN))
        browser.click("#enabled")
        until(lambda: not live.filters["enhance"].controls.settings.enabled)
        until(lambda: browser.run(SIGN) == "off")
        browser.press("body", " ")
        until(lambda: live.filters["enhance"].controls.settings.enabled)
        browser.press("body", "t")
        until(lambda: live.filters["enhance"].controls.settings.tier == "auto")
        browser.click("#wipe-on")
        until(lambda: live.filters["enhance"].controls.settings.wipe == 0.5)
        browser.click("#snapshot")
        until(lambda: browser.run("return !document.getElementById('files').hidden"))

        points = browser.run(
            "return history_.filter((h) => h.latency !== null && h.rate > 5).length"
        )
        assert points > 4
        inked = browser.run(
            "const c = document.getElementById('chart');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 128; return n;"
        )
        assert inked > 500
        browser.run("document.getElementById('chart').scrollIntoView({block: 'center'})")
        browser.shot(f"page-{name}-chart.png")
        # The server goes away: the page says so, and goes on by itself.
        browser.run("travel.pictures = 0; socket.close()")
        until(lambda: browser.run(SIGN) == "not connected")
        until(lambda: browser.run("return socket.readyState === 1 && travel.pictures > 0"))
        browser.call("DELETE", "")


# OBS


@pytest.fixture
def display(tmp_path: Path) -> Iterator[str]:
    """A virtual screen."""
    xvfb = program("Xvfb")
    reader, writer = os.pipe()
    arguments = [xvfb, "-displayfd", str(writer), "-screen", "0", "1280x900x24"]
    with running(*arguments, pass_fds=[writer]):
        os.close(writer)
        with os.fdopen(reader) as pipe:
            number = pipe.readline().strip()
        assert number, "Xvfb gave no display"
        yield f":{number}"


def obs_settings(home: Path, url: str, script: dict[str, Any]) -> None:
    """Write what OBS needs to start without questions: a scene with a media source."""
    folder = home / ".config" / "obs-studio"
    (folder / "basic" / "scenes").mkdir(parents=True)
    (folder / "basic" / "profiles" / "test").mkdir(parents=True)
    (folder / "global.ini").write_text(
        "[General]\nFirstRun=true\nEnableAutoUpdates=false\n[Basic]\nProfile=test\n"
        "ProfileDir=test\nSceneCollection=test\nSceneCollectionFile=test\n"
    )
    (folder / "basic" / "profiles" / "test" / "basic.ini").write_text(
        "[General]\nName=test\n[Video]\nBaseCX=1280\nBaseCY=720\nOutputCX=1280\nOutputCY=720\n"
    )
    media = {
        "is_local_file": False, "input": url, "input_format": "mpegts", "buffering_mb": 0,
        "reconnect_delay_sec": 1, "close_when_inactive": False,
    }  # fmt: skip
    item = {"name": "vidpipe", "id": 1, "visible": True, "align": 5}
    sources = [
        {"id": "ffmpeg_source", "name": "vidpipe", "settings": media},
        {"id": "scene", "name": "Scene", "settings": {"id_counter": 1, "items": [item]}},
    ]
    scene = {
        "name": "test", "current_scene": "Scene", "current_program_scene": "Scene",
        "scene_order": [{"name": "Scene"}], "sources": sources,
        "modules": {"scripts-tool": [script]},
    }  # fmt: skip
    (folder / "basic" / "scenes" / "test.json").write_text(json.dumps(scene))


def test_obs_starts_the_filter_by_its_script_and_shows_the_picture(
    display: str, sample: Path, doubler: str, tmp_path: Path
) -> None:
    obs = program("obs")
    pytest.importorskip("starlette")
    stream, page = free_port(), free_port()
    url = f"udp://127.0.0.1:{stream}"
    root = Path(__file__).resolve().parent.parent
    script = {
        "path": str(root / "samples" / "obs_vidpipe.py"),
        "settings": {
            "command": f"{sys.executable} -m vidpipe", "source": str(sample.resolve()),
            "output": url, "options": f"--tier {doubler} --set enhance.tier={doubler}",
            "port": page, "autostart": True,
        },
    }  # fmt: skip
    obs_settings(tmp_path, url, script)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    environment = os.environ | {
        "HOME": str(tmp_path), "DISPLAY": display, "XDG_RUNTIME_DIR": str(runtime),
        "LIBGL_ALWAYS_SOFTWARE": "1", "QT_QPA_PLATFORM": "xcb",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    environment.pop("XDG_CONFIG_HOME", None)
    with av.open(str(sample)) as file:
        original = next(file.decode(video=0)).to_ndarray(format="rgb24").mean()

    def grabbed() -> np.ndarray[Any, Any]:
        options = {"video_size": "1280x900"}
        with av.open(display, format="x11grab", container_options=options) as screen:
            return next(screen.decode(video=0)).to_ndarray(format="rgb24")

    def shows_the_picture() -> bool:
        # The preview is in the upper part of the window; a green meadow is in the picture.
        part = grabbed()[60:400, 220:860].astype(int)
        green = part[..., 1] - part[..., 2]
        return bool(green.mean() > 8 and part.std() > 20 and part.mean() < original)

    arguments = ["--multi", "--collection", "test", "--profile", "test", "--disable-updater"]
    with running(obs, *arguments, env=environment) as process:
        api = f"http://127.0.0.1:{page}/api"

        def answers() -> Any:
            assert process.poll() is None, "OBS ended"
            try:
                return httpx.get(f"{api}/state").json()["sinks"]["stream"]["frames"]
            except (httpx.HTTPError, KeyError):
                return None

        until(answers, 60)
        until(shows_the_picture, 60)
        with av.open(str(tmp_path / "obs.png"), "w", format="image2") as out:
            picture = av.VideoFrame.from_ndarray(grabbed(), "rgb24")
            png: Any = out.add_stream("png", rate=1)
            png.width, png.height, png.pix_fmt = picture.width, picture.height, "rgb24"
            out.mux(png.encode(picture))
            out.mux(png.encode(None))
        keep("obs.png", (tmp_path / "obs.png").read_bytes())


class FakeObs:
    """What the script uses of OBS's Python module."""

    OBS_TEXT_DEFAULT = 0

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.hotkeys: dict[str, Any] = {}

    def obs_data_get_string(self, _settings: Any, key: str) -> Any:
        return self.settings[key]

    obs_data_get_int = obs_data_get_bool = obs_data_get_string

    def obs_hotkey_register_frontend(self, _name: str, title: str, pressed: Any) -> str:
        self.hotkeys[title] = pressed
        return title

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


def test_the_obs_script_starts_controls_and_stops_the_filter(
    sample: Path, doubler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette")
    import importlib.util

    port = free_port()
    fake = FakeObs(
        command=f"{sys.executable} -m vidpipe", source=str(sample.resolve()),
        output=f"udp://127.0.0.1:{free_port()}", options=f"--tier {doubler} --snapshots {tmp_path}",
        port=port, autostart=False,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "obspython", fake)
    path = Path(__file__).resolve().parent.parent / "samples" / "obs_vidpipe.py"
    found = importlib.util.spec_from_file_location("obs_vidpipe", path)
    assert found is not None
    assert found.loader is not None
    script: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    script.script_load(None)
    script.script_properties()

    def now() -> Any:
        try:
            state = httpx.get(f"http://127.0.0.1:{port}/api/state").json()
            return next(iter(state["filters"].values()))
        except httpx.HTTPError:
            return None

    def press(name: str) -> None:
        fake.hotkeys[f"vidpipe: {name}"](True)

    try:
        press("start")
        until(lambda: (found := now()) and found["frames"])
        press("toggle")
        until(lambda: not now()["enabled"])
        press("wipe")
        until(lambda: now()["wipe"] == 0.5)
        press("tier")
        until(lambda: now()["tier"] == doubler)
        press("freeze")
        until(lambda: now()["frozen"])
        press("snapshot")
        until(lambda: len(list(tmp_path.glob("*.png"))) == 2)
        process = script._process
        script.script_unload()
        assert process.returncode == 0
        assert now() is None
    finally:
        script.stop()
