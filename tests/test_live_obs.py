"""With OBS on the other side.

Skipped where the program is not installed; `.ci/packages` names the Debian packages.
VIDPIPE_SHOTS may name a folder to keep pictures in.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import modelgen
import numpy as np
import pytest
from livekit import free_port, keep, program, running, until, virtual_screen

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that doubles the picture and darkens it, so that before and after differ."""
    path = tmp_path_factory.mktemp("models") / "dark.onnx"
    net = modelgen.Net().conv(np.full((4, 1, 1, 1), 0.6))
    net.add("DepthToSpace", blocksize=2, mode="CRD").save(path)
    return str(path)


@pytest.fixture
def display() -> Iterator[str]:
    with virtual_screen("1280x900") as name:
        yield name


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
