"""vidpipe live from OBS: load this under Tools > Scripts.

Starts and stops the filter, and puts its controls on buttons and hotkeys (Settings > Hotkeys,
"vidpipe: ..."). Its picture comes into OBS as a media source, see docs/obs.md.
"""

import json
import shlex
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import obspython as obs

DEFAULTS = {
    "command": "vidpipe",
    "source": "camera",
    "output": "udp://127.0.0.1:5700",
    "options": "--latency-budget 100ms",
    "port": 8765,
}
KEYS = ("toggle", "tier", "wipe", "freeze", "snapshot", "start", "stop")

_settings: dict[str, Any] = dict(DEFAULTS)
_autostart = False
_process: subprocess.Popen[bytes] | None = None
_hotkeys: dict[str, Any] = {}


def script_description() -> str:
    """Return what OBS shows above the properties."""
    return "Enhances a camera or stream with vidpipe while it runs. Hotkeys: Settings > Hotkeys."


def script_defaults(settings: Any) -> None:
    """Tell OBS the first values."""
    for key in ("command", "source", "output", "options"):
        obs.obs_data_set_default_string(settings, key, DEFAULTS[key])
    obs.obs_data_set_default_int(settings, "port", DEFAULTS["port"])
    obs.obs_data_set_default_bool(settings, "autostart", False)


def script_properties() -> Any:
    """Return the form and the buttons."""
    form = obs.obs_properties_create()
    for key, label in (
        ("command", "Command"),
        ("source", "Source: camera, screen, rtsp://..."),
        ("output", "Send the picture to"),
        ("options", "More options"),
    ):
        obs.obs_properties_add_text(form, key, label, obs.OBS_TEXT_DEFAULT)
    obs.obs_properties_add_int(form, "port", "Port of the page", 1024, 65535, 1)
    obs.obs_properties_add_bool(form, "autostart", "Start with OBS")
    for name in ("start", "stop", *KEYS[:5]):
        obs.obs_properties_add_button(form, f"button_{name}", name.capitalize(), _button(name))
    return form


def script_update(settings: Any) -> None:
    """Take what the user typed; a filter that runs keeps what it was started with."""
    global _autostart
    for key in ("command", "source", "output", "options"):
        _settings[key] = obs.obs_data_get_string(settings, key)
    _settings["port"] = obs.obs_data_get_int(settings, "port")
    _autostart = obs.obs_data_get_bool(settings, "autostart")


def script_load(settings: Any) -> None:
    """Register the hotkeys, and start if that is wanted."""
    script_update(settings)
    for name in KEYS:
        key = obs.obs_hotkey_register_frontend(
            f"vidpipe.{name}", f"vidpipe: {name}", _pressed(name)
        )
        saved = obs.obs_data_get_array(settings, f"hotkey_{name}")
        obs.obs_hotkey_load(key, saved)
        obs.obs_data_array_release(saved)
        _hotkeys[name] = key
    if _autostart:
        start()


def script_save(settings: Any) -> None:
    """Keep the hotkeys that the user chose."""
    for name, key in _hotkeys.items():
        saved = obs.obs_hotkey_save(key)
        obs.obs_data_set_array(settings, f"hotkey_{name}", saved)
        obs.obs_data_array_release(saved)


def script_unload() -> None:
    """Stop with OBS."""
    stop()


def start() -> None:
    """Start the filter, unless it runs."""
    global _process
    if _process is not None and _process.poll() is None:
        return
    arguments = [
        *shlex.split(_settings["command"]), "live", _settings["source"],
        "--stream", _settings["output"], "--page", str(_settings["port"]),
        *shlex.split(_settings["options"]),
    ]  # fmt: skip
    try:
        _process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except OSError as error:
        print(f"vidpipe cannot be started: {error}")
        return
    threading.Thread(target=_relay, args=(_process,), daemon=True).start()


def _relay(process: subprocess.Popen[bytes]) -> None:
    """Show what the filter says in OBS's script log."""
    for line in process.stderr or ():
        print(line.decode(errors="replace").rstrip())


def stop() -> None:
    """Stop the filter and wait until its outputs are complete."""
    global _process
    process, _process = _process, None
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(8)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def request(path: str, body: dict[str, Any] | None = None) -> Any:
    """Send a request to the filter's API and return its answer, or None."""
    call = urllib.request.Request(
        f"http://127.0.0.1:{_settings['port']}/api/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(call, timeout=2) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"vidpipe does not answer: {error}")
        return None


def act(name: str) -> Any:
    """Do what a button or a hotkey says."""
    if name in ("start", "stop"):
        start() if name == "start" else stop()
        return None
    if name == "snapshot":
        return request("snapshot", {})
    state = request("state")
    if not state or not state["filters"]:
        return None
    now = next(iter(state["filters"].values()))
    if name == "toggle":
        return request("control", {"enabled": not now["enabled"]})
    if name == "freeze":
        return request("control", {"frozen": not now["frozen"]})
    if name == "wipe":
        return request("control", {"wipe": 0.5 if now["wipe"] is None else None})
    tiers = ["auto", *now["tiers"]]
    return request("control", {"tier": tiers[(tiers.index(now["tier"]) + 1) % len(tiers)]})


def _background(name: str) -> None:
    """Act on a thread of its own: OBS must not wait for the network."""
    threading.Thread(target=act, args=(name,), daemon=True).start()


def _button(name: str) -> Callable[[Any, Any], bool]:
    def clicked(_properties: Any, _property: Any) -> bool:
        _background(name)
        return False

    return clicked


def _pressed(name: str) -> Callable[[bool], None]:
    def pressed(down: bool) -> None:
        if down:
            _background(name)

    return pressed
