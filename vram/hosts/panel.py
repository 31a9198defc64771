"""The live panel's side of ComfyUI: who looks, and what they are sent over its websocket.

A page asks by POST /intelligent_vram/watch to be sent what vram/live.py tells, for a few seconds; it asks again as long as it
shows it. While nobody looks nothing runs. Where there is no ComfyUI server, nothing here does anything.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..advise import Advice
    from ..swap import Swap

log = logging.getLogger(__name__)

EVENT = "intelligent_vram"
WATCH, STATE = "/intelligent_vram/watch", "/intelligent_vram/state"
LASTS = 15.0  # seconds
FAST, SLOW = 0.1, 1.0  # seconds between messages while a model computes, and while none does; nodes get the slow ones
PANEL, NODES = "panel", "nodes"


def _server() -> Any:
    """ComfyUI's PromptServer, or None."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def executing_node() -> str | None:
    """ComfyUI's id of the node that the calling thread runs, None outside of a prompt."""
    context = _context()
    return str(context.node_id) if context is not None else None


def _context() -> Any:
    get = getattr(sys.modules.get("comfy_execution.utils"), "get_executing_context", None)
    return get() if get is not None else None


_made_by: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def made(token: Any) -> None:
    """The node that runs now made settings that carry ``token``."""
    _made_by[token] = executing_node()


def node_of(token: Any) -> str | None:
    """The node that made settings that carry ``token``, None if that is not known."""
    return _made_by.get(token)


def attached(swap: Swap, node: str | None) -> None:
    """The host uses ``swap`` from now on; ``node`` asked for it."""
    from .. import live

    live.watch(swap, node)


def finished(swap: Swap) -> None:
    """The host's sampling with ``swap`` is over."""
    from .. import live

    context = _context()
    live.finished(swap, str(context.prompt_id) if context is not None else None)


def planned(advice: Advice) -> dict[str, Any]:
    """What a node shows of a plan, in the shape of its last run (see live.nodes); without figures where nothing is predicted."""
    from .. import live, live_swap

    prediction = advice.prediction
    if prediction is None:
        return live.of_node("", None)
    figures = live_swap.Figures(
        forwards=0,
        seconds=prediction.seconds,
        stall=0.0,
        streamed=prediction.plan.streamed_bytes,
        rate=0.0,
        link=0.0,
        floor=prediction.floor,
        peak=prediction.peak,
        limit=prediction.limit,
        encoded=prediction.plan.encoded_bytes,
        decoded=prediction.plan.decoded_bytes,
    )
    return live.of_node(live_swap.plan_strip(prediction.plan), figures)


class Watchers:
    """Who is sent what, until when, and the thread that sends, which lives while there is anyone."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._until: dict[tuple[str, str], float] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._sent: dict[tuple[str, str], Any] = {}

    def add(self, client: str, what: str) -> None:
        """Send ``what`` (PANEL or NODES) to ``client``, at once and for LASTS seconds from now."""
        with self._lock:
            self._until[client, what] = time.monotonic() + LASTS
            self._sent.pop((client, what), None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="intelligent-vram-panel", daemon=True)
                self._thread.start()
        self._wake.set()

    def remove(self, client: str, what: str) -> None:
        """Send it no more."""
        with self._lock:
            self._until.pop((client, what), None)

    def _present(self) -> list[tuple[str, str]] | None:
        """Who looks now; None, and the thread is to end, when nobody does."""
        now = time.monotonic()
        with self._lock:
            self._until = {who: until for who, until in self._until.items() if until > now}
            self._sent = {who: sent for who, sent in self._sent.items() if who in self._until}
            if not self._until:
                self._thread = None
                return None
            return list(self._until)

    def _run(self) -> None:
        from .. import live

        slow_at = 0.0
        while (present := self._present()) is not None:
            started = time.monotonic()
            slow = started >= slow_at
            if slow:
                slow_at = started + SLOW
            try:
                self._tell(present, slow)
            except Exception:
                log.exception("the panel could not be told what block swap is doing")
            self._wake.clear()
            busy = live.computing() and any(what == PANEL for _, what in present)
            if not busy:
                self._wake.wait(SLOW)
            time.sleep(max(0.0, FAST - (time.monotonic() - started)))

    def _tell(self, present: list[tuple[str, str]], slow: bool) -> None:
        for what, tell in ((PANEL, _panel), (NODES, _nodes)):
            new = {who for who in present if who[1] == what and who not in self._sent}
            clients = [who for who in present if who[1] == what and (what == PANEL or slow or who in new)]
            if not clients:
                continue
            told = tell()
            for who in clients:
                if self._sent.get(who) != told:
                    self._sent[who] = told
                    self._send(EVENT, {what: told}, who[0])


def _panel() -> dict[str, Any]:
    from .. import live

    management = sys.modules.get("comfy.model_management")
    return live.state(management.get_torch_device() if management is not None else "cpu")


def _nodes() -> dict[str, Any]:
    from .. import live

    return live.nodes()


def serve() -> None:
    """Add the routes to ComfyUI's server; once, before it starts."""
    server = _server()
    if server is None or hasattr(server, EVENT):
        return
    from aiohttp import web

    watchers = Watchers(server.send_sync)
    setattr(server, EVENT, watchers)

    @server.routes.post(WATCH)
    async def watch(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            client, what, on = body["client"], body["what"], bool(body.get("on", True))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return web.json_response({"seconds": 0}, status=400)
        if not isinstance(client, str) or what not in (PANEL, NODES):
            return web.json_response({"seconds": 0}, status=400)
        if client not in server.sockets:  # its socket is closed; it will ask again when it is back
            return web.json_response({"seconds": 0}, status=404)
        (watchers.add if on else watchers.remove)(client, what)
        return web.json_response({"seconds": LASTS if on else 0})

    @server.routes.get(STATE)
    async def tell(request: web.Request) -> web.Response:
        return web.json_response({PANEL: _panel(), NODES: _nodes()})
