"""The page's server over real connections, and the command line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelgen
import pytest
from livekit import Feed, free_port, live_spec, until

from vidpipe.errors import GraphError, InputError, MissingExtraError, OutputError
from vidpipe.graph import Graph
from vidpipe.live.capture import Frames
from vidpipe.live.command import live_graph, page_address, seconds
from vidpipe.live.page import Page, Picture
from vidpipe.live.session import Live

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
client = pytest.importorskip("websockets.sync.client")

from vidpipe.live.server import HEADER, IN_FLIGHT, Gate, Server  # noqa: E402


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(modelgen.nearest(tmp_path_factory.mktemp("models") / "doubler.onnx", 2))


@pytest.fixture
def served(doubler: str, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A filter that runs, with its page; `push` sends pictures through it."""
    feed = Feed(live_spec())
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("page", "page", "enhance")
    live = Live(graph, snapshots=tmp_path)
    server = Server(live, port=0)
    live.start()
    server.start()
    base = f"http://127.0.0.1:{server.port}"
    until(lambda: socket.create_connection(("127.0.0.1", server.port)).close() is None)
    with httpx.Client(base_url=base) as http:
        yield SimpleNamespace(
            live=live, feed=feed, http=http, server=server, tier=doubler, base=base
        )
    server.stop()
    feed.end()
    live.stop()


def connect(served: SimpleNamespace, **options: Any) -> Any:
    url = f"ws://127.0.0.1:{served.server.port}/ws"
    return client.connect(url, compression=None, **options)


def state_of(socket: Any) -> dict[str, Any]:
    while True:
        data = socket.recv(timeout=20)
        if isinstance(data, str):
            message: dict[str, Any] = json.loads(data)
            if message["type"] == "state":
                return message


def picture_of(socket: Any) -> tuple[int, bytes, bytes]:
    while True:
        data = socket.recv(timeout=20)
        if isinstance(data, bytes):
            number, length, _age = HEADER.unpack(data[: HEADER.size])
            body = data[HEADER.size :]
            return number, body[:length], body[length:]


def test_the_page_and_its_parts_are_served_and_nothing_else(served: SimpleNamespace) -> None:
    page = served.http.get("/")
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        assert served.http.get(f"/{name}").status_code == 200
        assert f'"{name}"' in page.text
    for path in ("/nothing", "/../server.py", "/%2e%2e/server.py", "/static/page.js", "/api"):
        assert served.http.get(path).status_code == 404


def test_state_and_controls_over_http(served: SimpleNamespace) -> None:
    state = served.http.get("/api/state").json()
    assert state["filters"]["enhance"]["tiers"] == [served.tier, "scale"]
    answer = served.http.post("/api/control", json={"strength": 0.5, "tier": "scale"})
    assert answer.status_code == 200
    assert answer.json()["strength"] == 0.5
    assert served.live.filters["enhance"].controls.settings.tier == "scale"
    answer = served.http.post("/api/control", json={"filter": "enhance", "enabled": False})
    assert answer.json()["enabled"] is False
    events = served.http.get("/api/events").json()
    assert [e["event"] for e in events] == ["control", "control"]


def test_snapshots_over_http(served: SimpleNamespace) -> None:
    assert served.http.get("/api/snapshot/after.png").status_code == 404
    assert served.http.post("/api/snapshot", json={}).status_code == 422  # no picture yet
    served.feed.push()
    until(lambda: served.live.filters["enhance"].pair())
    paths = served.http.post("/api/snapshot", json={}).json()
    after = served.http.get("/api/snapshot/after.png")
    assert after.content == Path(paths["after"]).read_bytes()
    assert after.content.startswith(b"\x89PNG")
    assert served.http.get("/api/snapshot/other.png").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 10000, 400),
        (b'{"strength": 2}', 422),
        (b'{"strength": NaN}', 422),
        (b'{"nonsense": 1}', 422),
        (b'{"filter": "other"}', 422),
        (b'{"filter": [1]}', 422),
        (b'{"x": "' + b"y" * 20000 + b'"}', 413),
    ],
)
def test_rubbish_gets_a_4xx_and_the_filter_goes_on(
    served: SimpleNamespace, body: bytes, status: int
) -> None:
    kind = {"content-type": "application/json"}
    answer = served.http.post("/api/control", content=body, headers=kind)
    assert answer.status_code == status
    assert len(answer.json()["error"]) < 300
    assert served.http.post("/api/control", content=b"strength=1").status_code == 415
    assert served.http.get("/api/control").status_code == 405
    served.feed.push()
    until(lambda: served.live.filters["enhance"].pair())


def test_bytes_that_are_not_http_end_that_connection_only(served: SimpleNamespace) -> None:
    for rubbish in (b"\x00\xff" * 500, b"GET / HTTP/1.1\r\nHost: a b c\r\n\r\n", b"\r\n" * 50):
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as peer:
            peer.sendall(rubbish)
            peer.shutdown(socket.SHUT_WR)
            answer = peer.recv(4096)
            assert answer == b"" or b" 4" in answer.split(b"\r\n")[0]
    assert served.http.get("/api/state").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_are_refused(served: SimpleNamespace, headers: dict[str, str]) -> None:
    answer = served.http.post("/api/control", json={"enabled": False}, headers=headers)
    assert answer.status_code == 403
    assert served.live.filters["enhance"].controls.settings.enabled
    with pytest.raises(Exception, match="403"):
        connect(served, additional_headers=headers).close()


def test_a_foreign_name_for_this_machine_is_refused(served: SimpleNamespace) -> None:
    answer = served.http.get("/api/state", headers={"host": "evil.example"})
    assert answer.status_code == 421
    same = {"host": f"localhost:{served.server.port}"}
    same["origin"] = f"http://localhost:{served.server.port}"
    assert served.http.get("/api/state", headers=same).status_code == 200


def test_the_token_is_needed_as_soon_as_others_can_reach_the_page(
    served: SimpleNamespace,
) -> None:
    server = Server(served.live, "0.0.0.0", 0)
    token = server.gate.token
    assert token is not None
    assert len(token) >= 20
    assert f"?token={token}" in server.url
    server.start()
    base = f"http://127.0.0.1:{server.port}"
    until(lambda: httpx.get(f"{base}/").status_code == 200)
    assert httpx.get(f"{base}/api/state").status_code == 401
    assert httpx.get(f"{base}/api/state?token=wrong").status_code == 401
    assert httpx.get(f"{base}/api/state?token={token}").status_code == 200
    bearer = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{base}/api/state", headers=bearer).status_code == 200
    with pytest.raises(Exception, match="403"):
        client.connect(f"ws://127.0.0.1:{server.port}/ws").close()
    with client.connect(f"ws://127.0.0.1:{server.port}/ws?token={token}") as peer:
        assert state_of(peer)["filters"]
    server.stop()


def test_names_of_a_gate() -> None:
    def status(host: str, name: str) -> int | None:
        refused = Gate(host, None).refuse("/", {"host": name}, "")
        return refused[0] if refused else None

    assert status("127.0.0.1", "127.0.0.1:8765") is None
    assert status("127.0.0.1", "[::1]:8765") is None
    assert status("127.0.0.1", "192.168.1.5:8765") == 421
    assert status("0.0.0.0", "192.168.1.5:8765") is None
    assert status("0.0.0.0", "rebound.example") == 421
    assert status("0.0.0.0", f"{socket.gethostname()}:8765") is None
    assert status("127.0.0.1", "") == 421


def test_pictures_and_figures_over_the_websocket(served: SimpleNamespace) -> None:
    with connect(served) as peer:
        assert state_of(peer)["sinks"]["page"]["frames"] == 0
        served.feed.push()
        number, before, after = picture_of(peer)
        assert number == 1
        assert before.startswith(b"\xff\xd8")
        assert after.startswith(b"\xff\xd8")
        assert before != after
        peer.send(json.dumps({"type": "control", "tier": "scale", "wipe": 0.25}))
        until(lambda: state_of(peer)["filters"]["enhance"]["tier"] == "scale")
        peer.send(json.dumps({"type": "snapshot"}))
        until(lambda: served.live.snapshot_bytes("after"))


@pytest.mark.parametrize(
    "message", ["{", "7", '{"type": "dance"}', '{"type": "control", "wipe": "left"}', b"\x00\x01"]
)
def test_rubbish_on_the_websocket_is_answered_and_changes_nothing(
    served: SimpleNamespace, message: str | bytes
) -> None:
    with connect(served) as peer:
        before = served.live.filters["enhance"].controls.settings
        peer.send(message)

        def complained() -> bool:
            data = peer.recv(timeout=20)
            return isinstance(data, str) and json.loads(data)["type"] == "error"

        until(complained)
        assert served.live.filters["enhance"].controls.settings == before
        assert state_of(peer)


def test_a_huge_message_ends_that_connection_only(served: SimpleNamespace) -> None:
    def drained(peer: Any) -> None:
        for _ in range(100):
            peer.recv(timeout=20)

    with connect(served) as peer:
        peer.send("x" * 100_000)
        with pytest.raises(Exception, match="1009"):
            drained(peer)
    with connect(served) as peer:
        assert state_of(peer)


def test_a_paused_page_gets_no_backlog_and_holds_up_nobody(served: SimpleNamespace) -> None:
    with connect(served) as paused, connect(served) as keen:
        until(lambda: len(served.live.pages["enhance"]._viewers) == 2)
        last = 0
        for _ in range(12):
            served.feed.push()
            last, _, _ = picture_of(keen)
            keen.send(json.dumps({"type": "drawn"}))
        assert last == 12
        numbers = []
        for _ in range(IN_FLIGHT):
            numbers.append(picture_of(paused)[0])
        assert numbers[0] == 1
        paused.send(json.dumps({"type": "drawn"}))
        assert picture_of(paused)[0] == 12  # what was missed is not sent later
    until(lambda: not served.live.pages["enhance"]._viewers)


def test_nothing_is_encoded_while_nobody_looks(served: SimpleNamespace) -> None:
    served.feed.push(3)
    until(lambda: served.live.filters["enhance"].pair())
    until(lambda: served.live.sinks["page"].state == "unwatched")
    state = served.http.get("/api/state").json()["sinks"]["page"]
    assert state["frames"] == 0
    assert set(state["drops"]) <= {"behind"}


def test_pictures_are_scaled_down_to_the_pages_width() -> None:
    page, got = Page(width=100), list[Picture]()
    page.plan(live_spec(256, 192))
    page.watch(got.append)
    from vidpipe.testing import pattern

    page.write(pattern(live_spec(256, 192), 1))
    import io

    import av

    with av.open(io.BytesIO(got[0].after), format="jpeg_pipe") as file:
        shown = next(file.decode(video=0))
    assert (shown.width, shown.height) == (100, 74)
    assert got[0].before is got[0].after


def test_a_port_in_use_is_one_line(served: SimpleNamespace) -> None:
    with pytest.raises(OutputError, match="already in use") as caught:
        Server(served.live, port=served.server.port)
    assert "--page" in str(caught.value)
    with pytest.raises(OutputError, match="cannot be served"):
        Server(served.live, "203.0.113.1", 0)


def test_without_the_web_extra_the_line_to_install_it_is_shown(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"vidpipe\[web\]"):
        Server(served.live, port=0)


# The command line


def test_what_the_command_line_says() -> None:
    assert seconds("50ms") == seconds("0.05s") == seconds("0.05") == 0.05
    assert page_address("8765") == ("127.0.0.1", 8765)
    assert page_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert page_address("[::1]:80") == ("::1", 80)
    for wrong in ("fast", "-5ms", "5 minutes"):
        with pytest.raises(InputError, match="50ms"):
            seconds(wrong)
    for wrong in ("", "host", "host:http", "70000"):
        with pytest.raises(InputError, match="HOST:PORT"):
            page_address(wrong)


def test_the_graph_of_the_command_line() -> None:
    graph = live_graph(
        "camera", streams=["udp://h:1", "udp://h:2"], records=[Path("a.mkv")], page=True,
        capture={"size": "640x360", "rate": None}, audio=False,
    )  # fmt: skip
    assert [n.name for n in graph.ordered()] == [
        "source", "enhance", "stream", "stream2", "record", "page",
    ]  # fmt: skip
    assert graph.nodes["source"].options == {
        "address": "camera", "size": "640x360", "audio": False,
    }  # fmt: skip
    assert graph.nodes["stream2"].options == {"url": "udp://h:2", "audio": False}
    exact = live_graph("camera", page=True, precision="int8", device="openvino")
    options = exact.nodes["enhance"].options
    assert (options["precision"], options["device"]) == ("int8", "openvino")
    with pytest.raises(InputError, match="goes nowhere"):
        live_graph("camera")
    with pytest.raises(InputError, match="a source is needed"):
        live_graph(None, page=True)
    with pytest.raises(GraphError, match="no option 'sise'"):
        live_graph("camera", page=True, overrides=["source.sise=1"])


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    code = (
        "import typer, sys; from vidpipe.live.command import live\n"
        "from vidpipe.errors import VidpipeError\n"
        "app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)\n"
        "app.command()(live)\n"
        "try: app(standalone_mode=False)\n"
        "except VidpipeError as error: sys.exit(f'error: {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_json_lines_of_a_run(sample: Path, doubler: str, tmp_path: Path) -> None:
    process = command(
        str(sample), "--tier", doubler, "--record", str(tmp_path / "r.mp4"), "--json",
        "--latency-budget", "2s", "--duration", "2",
    )  # fmt: skip
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in output.splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds[0] == "started"
    assert kinds[-1] == "report"
    assert "state" in kinds
    record = lines[-1]["sinks"]["record"]
    assert record["frames"] > 10
    assert record["p50_ms"] <= record["p95_ms"] <= record["p99_ms"]
    assert lines[-1]["filters"]["enhance"]["latency_budget_ms"] == 2000
    assert lines[-1]["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v4l2:/dev/video99", "--page", "0"], "there is no camera '/dev/video99'"),
        (["rtmp://127.0.0.1:1/a", "--page", "0"], "Connection refused"),
        (["camera"], "the picture goes nowhere"),
        (["SAMPLE", "--stream", "out.mp4"], "cannot stream to 'out.mp4'"),
        (["SAMPLE", "--page", "0", "--latency-budget", "soon"], "Write 50ms"),
        (["SAMPLE", "--page", "0", "--tier", "nosuch"], "no built-in model is called 'nosuch'"),
        (["SAMPLE", "--page", "0", "--precision", "int9"], "precision 'int9' is not known"),
    ],
)
def test_wrong_use_is_one_line(sample: Path, arguments: list[str], message: str) -> None:
    process = command(*[str(sample) if a == "SAMPLE" else a for a in arguments])
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output == ""
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_two_filters_at_once_both_deliver(sample: Path, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    processes = [
        command(
            str(sample), "--page", str(port), "--set", "enhance.tiers=[]",
            "--record", str(tmp_path / f"{port}.mkv"),
        )
        for port in ports
    ]  # fmt: skip

    def frames(port: int) -> Any:
        try:
            state = httpx.get(f"http://127.0.0.1:{port}/api/state").json()
            return state["sinks"]["record"]["frames"]
        except (httpx.HTTPError, KeyError):
            return 0

    try:
        until(lambda: all(frames(port) > 3 for port in ports), 120)
        kind = {"content-type": "application/json"}
        httpx.post(
            f"http://127.0.0.1:{ports[0]}/api/control", content='{"frozen":true}', headers=kind
        )
        frozen = [
            httpx.get(f"http://127.0.0.1:{port}/api/state").json()["filters"]["enhance"]["frozen"]
            for port in ports
        ]
        assert frozen == [True, False]
        for port in ports:
            with client.connect(f"ws://127.0.0.1:{port}/ws", compression=None) as peer:
                assert picture_of(peer)[2].startswith(b"\xff\xd8")
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=30)
    assert [p.returncode for p in processes] == [0, 0]


def test_a_port_in_use_ends_the_command_in_one_line(sample: Path, doubler: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = command(str(sample), "--tier", doubler, "--page", port)
        _, errors = process.communicate(timeout=60)
    assert "in use" in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
def test_keys_in_a_terminal(sample: Path, doubler: str) -> None:
    import os
    import pty

    port = free_port()
    parent, child = pty.openpty()
    process = command(str(sample), "--tier", doubler, "--page", str(port), stdin=child)
    assert process.stderr is not None
    drained = threading.Thread(target=process.stderr.read, daemon=True)

    def state() -> Any:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/api/state").json()["filters"]["enhance"]
        except (httpx.HTTPError, KeyError):
            return None

    until(lambda: (found := state()) and found["frames"])
    drained.start()
    os.write(parent, b" ")
    until(lambda: not state()["enabled"])
    os.write(parent, b"tw")
    until(lambda: state()["tier"] == doubler and state()["wipe"] == 0.5)
    os.write(parent, b"q")
    assert process.wait(20) == 0
    drained.join(5)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    os.close(parent)
    os.close(child)
