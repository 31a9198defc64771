"""What the tests change about the process in which ComfyUI runs."""

import gc
import logging
import os
import threading

import psutil
from aiohttp import web
from server import PromptServer


def end_with_parent() -> None:
    """Should the process that started ComfyUI die without stopping it, end ComfyUI too."""
    parent = psutil.Process(os.getppid())

    def wait() -> None:
        parent.wait()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def serve_pending_flags() -> None:
    """`/helper_nodes/pending_flags`: what was asked of `/free` and not yet taken up by the thread that runs the prompts."""

    @PromptServer.instance.routes.get("/helper_nodes/pending_flags")
    async def pending_flags(request: web.Request) -> web.Response:
        return web.json_response(PromptServer.instance.prompt_queue.get_flags(reset=False))


def serve_messages() -> None:
    """`/helper_nodes/tell`: send all pages a message over ComfyUI's websocket, as a pack does."""

    @PromptServer.instance.routes.post("/helper_nodes/tell")
    async def tell(request: web.Request) -> web.Response:
        body = await request.json()
        PromptServer.instance.send_sync(body["event"], body["data"])
        return web.json_response({})


def collect_garbage_faster() -> None:
    """Let garbage collection pass by what custom nodes and ComfyUI have imported when all of them are loaded.

    The hosts collect garbage up to five times a prompt, which would take longer than to sample with a tiny model. What
    is made later, the executor and its caches among it, is collected as ever.
    """
    server = PromptServer.instance
    add_routes = server.add_routes

    def freeze_and_add_routes() -> None:
        gc.collect()
        gc.freeze()
        add_routes()

    server.add_routes = freeze_and_add_routes


def log_errors_told_to_the_user() -> None:
    """Write what ComfyUI shows to the user as an error into its log, where a test can read it.

    A node that was blocked with a message tells it to the frontend alone; the prompt succeeds.
    """
    server = PromptServer.instance
    send = server.send_sync

    def send_sync(event: str, data: dict, sid: str | None = None) -> None:
        if event == "execution_error":
            logging.info("helper_nodes: told the user: %s", data["exception_message"])
        send(event, data, sid)

    server.send_sync = send_sync
