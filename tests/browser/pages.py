"""ComfyUI's page in a browser, in the words of the tests."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..host.comfy import ComfyServer
from ..host.workflows import text_to_video

APP = "window.comfyAPI?.app?.app"
OURS = ("intelligentvram", "intelligent_vram", "ivram")
SWAP = {"max_vram_gb": 0.1, "block_size_mb": 1, "swap_mode": "adaptive", "empty_cache_freq": 0}
WRAPPER, PLANNER = "2", "90"
# nodes as elements of the page; front ends of older ComfyUI have an early form, which they do not offer to users
NODES_2, NODES_2_SINCE = "Comfy.VueNodes.Enabled", (0, 4)


def workflow(*, steps: int = 4, swapped: bool = True, planned: bool = False) -> dict[str, Any]:
    """A prompt in API format with numbers for ids, as the front end wants them: 2 is the Block Swap Wrapper, 90 Intelligent
    VRAM."""
    between = [("BlockSwapWrapper", SWAP)] if swapped else []
    prompt = text_to_video("wan.safetensors", steps=steps, between=between, width=64, height=64)
    number = {name: str(index + 1) for index, name in enumerate(prompt)}
    renamed = {
        number[name]: {
            "class_type": node["class_type"],
            "inputs": {
                key: [number[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            },
        }
        for name, node in prompt.items()
    }
    if planned:
        inputs = {"width": 64, "height": 64, "num_frames": 5, "model_name": "wan.safetensors"}
        renamed[PLANNER] = {"class_type": "IntelligentVRAMNode", "inputs": inputs}
        renamed["91"] = {"class_type": "PreviewAny", "inputs": {"source": [PLANNER, 2]}}
    return renamed


class Panel:
    """A tab of the browser with ComfyUI's page. ``errors``: what this pack wrote to the console as an error."""

    def __init__(self, context: Any, server: ComfyServer, screenshots: Path | None) -> None:
        self.context = context
        self.server = server
        self.errors: list[str] = []
        self._screenshots = screenshots
        self.page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._note(f"{error} {getattr(error, 'stack', '')}"))
        self.page.goto(server._url)
        self.page.wait_for_function(f"{APP}?.extensionManager && {APP}.graph && {APP}.canvas", timeout=60_000)
        self.page.wait_for_selector(".intelligent-vram-tab-button", timeout=60_000)
        self.forget()
        self.script(
            "window.comfyAPI.api.api.addEventListener('intelligent_vram', "
            "(event) => window.told.push([performance.now() / 1000, event.detail]))"
        )

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self._note(f"{message.text} {message.location.get('url', '')}")

    def _note(self, text: str) -> None:
        if any(word in text.lower() for word in OURS):
            self.errors.append(text)

    def forget(self) -> None:
        """Forget what the websocket has brought of this pack."""
        self.script("window.told = []")

    def told(self, what: str) -> list[tuple[float, Any]]:
        """What the websocket has brought since, "panel" or "nodes", and when, in seconds."""
        return [(when, message[what]) for when, message in self.script("return window.told") if what in message]

    def script(self, code: str, argument: Any = None) -> Any:
        """Evaluate JavaScript in the page; ``app`` is ComfyUI's."""
        return self.page.evaluate(f"async (argument) => {{ const app = {APP}; {code} }}", argument)

    def open(self, prompt: Mapping[str, Any]) -> None:
        """Open a workflow in the graph."""
        self.script("await app.loadApiJson(argument, 'test')", dict(prompt))
        self.page.wait_for_function(f"{APP}.graph._nodes.length >= {len(prompt)}")

    def show(self) -> None:
        """Open the sidebar tab."""
        if not self.page.locator(".ivram-panel").is_visible():
            self.page.locator(".intelligent-vram-tab-button").click()
        self.page.wait_for_selector(".ivram-panel:not([data-state=waiting])", timeout=20_000)

    def run(self, *, timeout: float = 120) -> tuple[str, dict[str, Any]]:
        """Press Queue and wait; the prompt's id and its history entry."""
        prompt = self.queue()
        return prompt, self.server.wait(prompt, timeout)

    def queue(self) -> str:
        """Press Queue; the prompt's id."""
        known = set(self.server.get("/history"))
        self.script("await app.queuePrompt(0, 1)")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            queue = self.server.get("/queue")
            ids = {item[1] for item in (*queue["queue_running"], *queue["queue_pending"])}
            new = (ids | set(self.server.get("/history"))) - known
            if new:
                return new.pop()
            self.page.wait_for_timeout(50)
        raise TimeoutError("the prompt was not queued")

    def set(self, setting: str, value: Any) -> None:
        """Change one of ComfyUI's settings, as its dialog does."""
        self.script("await app.extensionManager.setting.set(argument[0], argument[1])", [setting, value])

    def text(self, selector: str) -> str:
        """The text of the first such element, empty if there is none."""
        found = self.page.locator(selector)
        return found.first.inner_text() if found.count() else ""

    def until(self, what: Callable[[], Any], timeout: float = 20) -> Any:
        """What ``what`` returns once that is true."""
        deadline = time.monotonic() + timeout
        while not (found := what()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not in {timeout:g} s\n{self.text('.ivram-panel')}")
            self.page.wait_for_timeout(50)
        return found

    def fit(self, kind: str = "BlockSwapWrapper") -> None:
        """Show the first node of a kind in the middle, at a size that can be read."""
        self.script(
            "const node = app.graph._nodes.find((n) => n.comfyClass === argument);"
            "app.canvas.ds.scale = 1; app.canvas.centerOnNode(node); app.canvas.setDirty(true, true);",
            kind,
        )
        self.page.wait_for_timeout(300)

    def picture(self, name: str) -> None:
        """Keep a screenshot, where they are wanted."""
        if self._screenshots is not None:
            self._screenshots.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(self._screenshots / f"{name}.png"))
