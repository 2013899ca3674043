"""The page, and the HTTP and WebSocket API that it uses.

    GET  /                        the page
    GET  /api/state               all figures
    GET  /api/events              the last events
    POST /api/control             {"filter": NAME, ...changes} -> settings
    POST /api/snapshot            {"filter": NAME} -> file names
    GET  /api/snapshot/before.png, /api/snapshot/after.png
    WS   /ws                      pictures and figures out, controls in

Requests of other sites are refused by their Host and Origin, and everything under /api and
/ws needs the token if there is one. A request that is wrong gets a 4xx and changes nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vidpipe.errors import InputError, MissingExtraError, OutputError, VidpipeError
from vidpipe.live.page import Page, Picture
from vidpipe.live.session import Live

FOLDER = Path(__file__).parent / "static"
MOST_BODY = 16 * 1024
STATE_S = 0.25
"""How often figures are sent to the page."""

IN_FLIGHT = 2
"""Pictures that a page may have received and not yet drawn. More would be latency."""

HEADER = struct.Struct("<IId")
"""Of a picture message: number, length of `before`, age in seconds; then the two JPEG files."""

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """Decides which requests may come in.

    Args:
        host: what the server is bound to.
        token: what every request to the API must carry, or None.
    """

    def __init__(self, host: str, token: str | None) -> None:
        self.host = host
        self.token = token

    def refuse(self, path: str, headers: dict[str, str], query: str) -> tuple[int, str] | None:
        """Return (status, reason) for a request that is refused.

        Args:
            path: of the request.
            headers: by lower-case name.
            query: of the request, without "?".
        """
        host = headers.get("host", "")
        if not self._is_ours(urlsplit(f"//{host}").hostname or ""):
            return 421, "this server is not known by that name"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests of other sites are refused"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "requests of other sites are refused"
        if self.token is not None and path.startswith(("/api/", "/ws")):
            given = headers.get("authorization", "")
            given = given[7:] if given.lower().startswith("bearer ") else ""
            given = given or parse_qs(query).get("token", [""])[0]
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return 401, "the token is missing or wrong"
        return None

    def _is_ours(self, name: str) -> bool:
        """Say whether a Host names this server. Addresses do; another's domain name does not."""
        if is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in (self.host.lower(), socket.gethostname().lower())
        return True


class Server:
    """Serves a running filter on a thread of its own.

    Args:
        live: the filter.
        host: address to bind to.
        port: 0 for any that is free.
        token: what requests must carry; made up where the address is not loopback.

    Raises:
        MissingExtraError: Starlette or uvicorn is not installed.
        OutputError: the port is in use, or the address is not this machine's.
    """

    def __init__(
        self, live: Live, host: str = "127.0.0.1", port: int = 8765, token: str | None = None
    ) -> None:
        try:
            import starlette  # noqa: F401 - looked for here, used by `application`
            import uvicorn
            import websockets  # noqa: F401 - uvicorn's WebSocket protocol
        except ImportError as error:
            raise MissingExtraError(str(error.name).partition(".")[0], "web") from None
        if token is None and not is_loopback(host):
            token = secrets.token_urlsafe(18)
        self.live = live
        self.gate = Gate(host, token)
        self.host = host
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            application(live, self.gate),
            log_level="critical",
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=MOST_BODY,
            ws_per_message_deflate=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="vidpipe-server", daemon=True
        )

    @property
    def url(self) -> str:
        """Where the page is, with the token."""
        shown = self.host
        if self.host in ("0.0.0.0", "::"):
            shown = socket.gethostname()
        elif ":" in shown:
            shown = f"[{shown}]"
        query = f"/?token={self.gate.token}" if self.gate.token else "/"
        return f"http://{shown}:{self.port}{query}"

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Close every connection."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(3)
        self._socket.close()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise OutputError(f"the page cannot be served on '{host}:{port}': {error}") from None
    try:
        # On Windows this option would let two programs have the same port.
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"the page cannot be served on '{host}:{port}': {reason}",
            hint="Choose another port: --page PORT",
        ) from None
    return listener


def application(live: Live, gate: Gate) -> Any:
    """Return the ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute

    def wrong(status: int, message: str) -> Response:
        return JSONResponse({"error": message}, status, headers=_SECURITY)

    async def body(request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _BadRequestError(415, "send application/json")
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MOST_BODY:
                raise _BadRequestError(413, f"at most {MOST_BODY} bytes")
        return _object(data)

    async def state(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(live.state), headers=_SECURITY)

    async def events(_request: Request) -> Response:
        return JSONResponse(live.events(), headers=_SECURITY)

    async def control(request: Request) -> Response:
        changes = await body(request)
        settings = live.control(*_taken(changes))
        return JSONResponse(settings, headers=_SECURITY)

    async def snapshot(request: Request) -> Response:
        _, name = _taken(await body(request))
        return JSONResponse(await run_in_threadpool(live.snapshot, name), headers=_SECURITY)

    async def snapshot_file(request: Request) -> Response:
        data = live.snapshot_bytes(request.path_params["which"])
        if data is None:
            return wrong(404, "no snapshot was taken yet")
        return Response(data, media_type="image/png", headers=_SECURITY)

    async def static(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        file = FOLDER / name
        if name not in {p.name for p in FOLDER.iterdir()}:
            return wrong(404, "there is no such page")
        kind = _TYPES[file.suffix]
        return Response(file.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=_SECURITY)

    async def bad_request(_request: Request, error: Exception) -> Response:
        assert isinstance(error, _BadRequestError)
        return wrong(error.status, error.reason)

    async def input_error(_request: Request, error: Exception) -> Response:
        return wrong(422 if isinstance(error, InputError) else 500, str(error))

    async def not_found(_request: Request, error: Exception) -> Response:
        return wrong(getattr(error, "status_code", 404), getattr(error, "detail", "not found"))

    app = Starlette(
        routes=[
            Route("/", static),
            Route("/{name:str}", static),
            Route("/api/state", state),
            Route("/api/events", events),
            Route("/api/control", control, methods=["POST"]),
            Route("/api/snapshot", snapshot, methods=["POST"]),
            Route("/api/snapshot/{which:str}.png", snapshot_file),
            WebSocketRoute("/ws", _Channel.serve(live)),
        ],
        exception_handlers={
            _BadRequestError: bad_request,
            VidpipeError: input_error,
            404: not_found,
            405: not_found,
        },
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        query = scope.get("query_string", b"").decode("latin-1")
        try:
            refused = gate.refuse(scope["path"], headers, query)
        except ValueError:  # a Host or Origin that is no address at all
            refused = 400, "Host or Origin is not understood"
        if refused is None:
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await wrong(*refused)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 4000 + refused[0]})

    return guarded


class _BadRequestError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def _object(data: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise _BadRequestError(400, "not valid JSON") from None
    if not isinstance(value, dict):
        raise _BadRequestError(400, "expected a JSON object")
    return value


def _taken(message: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return changes and filter of a message."""
    changes = dict(message)
    name = changes.pop("filter", None)
    if name is not None and not isinstance(name, str):
        raise _BadRequestError(422, "'filter' is not a name")
    return changes, name


class _Channel:
    """One WebSocket: figures and pictures out, controls in."""

    def __init__(self, live: Live, socket: Any) -> None:
        self._live = live
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._fresh = asyncio.Event()
        self._picture: Picture | None = None
        self._in_flight = 0
        self._leave: Callable[[], None] = lambda: None

    @classmethod
    def serve(cls, live: Live) -> Any:
        """Return the endpoint."""

        async def endpoint(socket: Any) -> None:
            await socket.accept()
            await cls(live, socket)._run()

        return endpoint

    async def _run(self) -> None:
        self._watch(None)
        tasks = [
            asyncio.create_task(t()) for t in (self._send_state, self._send_pictures, self._receive)
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self, name: str | None) -> None:
        self._leave()
        page: Page | None = None
        if self._live.pages:
            key = next(iter(self._live.pages)) if name is None else self._live.filter_named(name)
            page = self._live.pages.get(key)
        self._leave = page.watch(self._offer) if page is not None else lambda: None

    def _offer(self, picture: Picture) -> None:
        """Take a picture; called on the page stage's thread."""
        try:
            self._loop.call_soon_threadsafe(self._latest, picture)
        except RuntimeError:  # the server is gone
            self._leave()

    def _latest(self, picture: Picture) -> None:
        self._picture = picture
        self._fresh.set()

    async def _send_pictures(self) -> None:
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            picture = self._picture
            if picture is None or self._in_flight >= IN_FLIGHT:
                continue
            self._picture = None
            self._in_flight += 1
            age_s = self._live.clock.now_s() - picture.captured_s
            before = b"" if picture.before is picture.after else picture.before
            head = HEADER.pack(picture.number & 0xFFFFFFFF, len(before), age_s)
            await self._socket.send_bytes(head + before + picture.after)

    async def _send_state(self) -> None:
        seen = 0
        while True:
            state = await asyncio.to_thread(self._live.state)
            events = [e for e in self._live.events() if e["number"] > seen]
            if events:
                seen = events[-1]["number"]
            message = {"type": "state", **state, "events": events}
            await self._socket.send_text(json.dumps(message))
            await asyncio.sleep(STATE_S)

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                await self._take(message.get("text"))
            except _BadRequestError as error:
                await self._complain(error.reason)
            except VidpipeError as error:
                await self._complain(str(error))

    async def _complain(self, reason: str) -> None:
        await self._socket.send_text(json.dumps({"type": "error", "error": reason}))

    async def _take(self, text: str | None) -> None:
        if text is None:
            raise _BadRequestError(400, "send JSON as text")
        message = _object(text)
        kind = message.pop("type", None)
        if kind == "drawn":
            self._in_flight = max(0, self._in_flight - 1)
            if self._picture is not None:
                self._fresh.set()
        elif kind == "control":
            self._live.control(*_taken(message))
        elif kind == "snapshot":
            paths = await asyncio.to_thread(self._live.snapshot, _taken(message)[1])
            await self._socket.send_text(json.dumps({"type": "snapshot", **paths}))
        elif kind == "watch":
            self._watch(_taken(message)[1])
        else:
            raise _BadRequestError(400, "'type' is drawn, control, snapshot or watch")
