"""The page in a real browser, headless.

Skipped where the program is not installed; `.ci/packages` names the Debian packages.
VIDPIPE_SHOTS may name a folder to keep pictures in.
"""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import modelgen
import numpy as np
import pytest
from livekit import PATH, free_port, keep, listens, program, running, until

from vidpipe.graph import Graph
from vidpipe.live.session import Live

httpx = pytest.importorskip("httpx")

SIGN = "return document.getElementById('sign').textContent"


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that doubles the picture and darkens it, so that before and after differ."""
    path = tmp_path_factory.mktemp("models") / "dark.onnx"
    net = modelgen.Net().conv(np.full((4, 1, 1, 1), 0.6))
    net.add("DepthToSpace", blocksize=2, mode="CRD").save(path)
    return str(path)


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

    def press_keys(self, keys: str) -> None:
        """Press and release keys wherever the focus is."""
        steps = [{"type": t, "value": k} for k in keys for t in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": steps}]
        self.call("POST", "/actions", {"actions": actions})

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
    [
        ("wide", 1400, 900, False),
        ("wide-dark", 1400, 900, True),
        ("phone", 390, 844, True),
        ("phone-light", 390, 844, False),
    ],
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
        # Tab reaches every control, and each shows that it has the focus.
        reached = []
        for _ in range(7):
            browser.press_keys("\ue004")
            outline = browser.run(
                "const s = getComputedStyle(document.activeElement);"
                "return [document.activeElement.id, s.outlineStyle, parseFloat(s.outlineWidth)];"
            )
            reached.append(outline[0])
            assert outline[1] == "solid" and outline[2] >= 2, outline  # noqa: PT018
        assert reached == ["slider", "enabled", "frozen", "snapshot", "tier", "strength", "wipe-on"]
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
