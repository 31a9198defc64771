"""A real ComfyUI, found on this machine, started for the tests and driven over its HTTP API."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent
PACK_NAME = "ComfyUI-IntelligentVRAM"
POLL_SECONDS = 0.05
CONTEXT_GIB = 1.0  # more than a CUDA context, its libraries and what torch allocates at least take
TOO_SMALL_GIB = 0.002
# On a CPU that other work shares, threads that wait for each other make a tiny model's step 50 times slower.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be started: its folder, the Python that has what it needs, its version, and its device."""

    root: Path
    python: Path
    version: tuple[int, ...]
    cuda: bool


class PromptFailed(RuntimeError):
    """A prompt was rejected, raised in a node, or was interrupted. The text names the node and the exception.

    `entry` is its history entry, empty for a prompt that was rejected before it ran.
    """

    def __init__(self, text: str, entry: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.entry = entry or {}


def find_host() -> Host | str:
    """The ComfyUI to test against, or one line that says why there is none.

    Its folder is `COMFYUI_PATH`, else the ComfyUI whose `custom_nodes` holds this pack, else `~/comfy/ComfyUI`.
    Its Python is `COMFYUI_PYTHON`, else a `venv` or `.venv` beside or inside the folder, else the one that runs this.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    candidates = [Path(chosen).expanduser()] if chosen else [PACK.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    root = next((c.absolute() for c in candidates if (c / "main.py").is_file() and (c / "comfy").is_dir()), None)
    if root is None:
        return f"no ComfyUI in {' or '.join(map(str, candidates))}; set COMFYUI_PATH to its folder"
    python = _python_of(root)
    probe = "import torch, aiohttp, safetensors; print(torch.cuda.is_available())"
    try:
        result = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}; set COMFYUI_PYTHON to ComfyUI's Python"
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return f"{python} has not what ComfyUI needs ({reason}); set COMFYUI_PYTHON to ComfyUI's Python"
    return Host(root, python, _version_of(root), cuda=result.stdout.split()[-1] == "True")


def _python_of(root: Path) -> Path:
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        python = Path(chosen).expanduser()
        return python.absolute() if python.is_file() else python
    executable = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    environments = [folder / name / executable for folder in (root.parent, root) for name in ("venv", ".venv")]
    return next((python for python in environments if python.is_file()), Path(sys.executable))


def _version_of(root: Path) -> tuple[int, ...]:
    file = root / "comfyui_version.py"
    numbers = re.search(r'__version__ = "([\d.]+)', file.read_text()) if file.is_file() else None
    return tuple(map(int, numbers[1].strip(".").split("."))) if numbers else ()


def cached_nodes(entry: Mapping[str, Any]) -> set[str]:
    """Ids of the nodes that ComfyUI did not run for this history entry, because it still had their outputs."""
    return {node for name, data in entry["status"]["messages"] if name == "execution_cached" for node in data["nodes"]}


class ComfyServer:
    """ComfyUI as a subprocess on a loopback port, between `with` and its end.

    It sees nothing of the user's installation but the code: models, custom nodes, input, output, temp, user data and
    database lie under `base`. Its custom nodes are this pack, the tests' helper nodes and the folders in `packs`.
    It ends with the process that started it, and without CUDA computes in one thread.

    Args:
        host: what `find_host` returned.
        base: an empty folder, kept afterwards. It may hold `models/...` already.
        args: further command line arguments of ComfyUI.
        env: environment variables to set for it.
        packs: folders of further custom nodes to link in.
        start_timeout: seconds until the server must answer.
    """

    def __init__(
        self,
        host: Host,
        base: Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        packs: Iterable[Path] = (),
        start_timeout: float = 180,
    ) -> None:
        self.host = host
        self.base = base.absolute()
        self.models = self.base / "models"
        self.output = self.base / "output"
        self.log_file = self.base / "comfyui.log"
        self._args = list(args)
        self._env = {"PYTHONUNBUFFERED": "1"} | ({} if host.cuda else ONE_THREAD) | dict(env or {})
        self._packs = {PACK_NAME: PACK, "helper_nodes": HERE / "helper_nodes"} | {p.name: p.absolute() for p in packs}
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def __enter__(self) -> "ComfyServer":
        self._lay_out()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.base,
                env=os.environ | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _lay_out(self) -> None:
        for folder in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._packs.items():
            link = self.base / "custom_nodes" / name
            if not link.is_symlink():
                link.symlink_to(source, target_is_directory=True)

    def _command(self, port: int) -> list[str]:
        root = self.host.root
        start = [str(root / "main.py")] if self.host.cuda else [str(HERE / "cpu_launcher.py"), str(root)]
        database = self.base / "user" / "comfyui.db"
        return [
            str(self.host.python),
            *start,
            *("--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *self._args,
        ]

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            self._check_alive()
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"ComfyUI did not answer in {self._start_timeout:g} s\n{self._log_tail()}"
                    ) from None
            time.sleep(POLL_SECONDS)

    def _check_alive(self) -> None:
        if self._process is None:
            raise RuntimeError("ComfyUI is not running: use ComfyServer in a with statement")
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"ComfyUI ended with exit status {code}\n{self._log_tail()}")

    def stop(self) -> None:
        """End ComfyUI and wait until it is gone. The log and the folders stay."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def pid(self) -> int:
        """Process id of the running ComfyUI."""
        self._check_alive()
        assert self._process is not None
        return self._process.pid

    def log_text(self) -> str:
        """All that ComfyUI has written so far, stdout and stderr."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""

    def _log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_log(self, text: str, *, start: int = 0, timeout: float = 60) -> None:
        """Return once `text` stands in the log at or after character `start`."""
        deadline = time.monotonic() + timeout
        while text not in self.log_text()[start:]:
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} is not in ComfyUI's log after {timeout:g} s\n{self._log_tail()}")
            time.sleep(POLL_SECONDS)

    def get(self, path: str) -> Any:
        """The JSON at a path of the API."""
        with urllib.request.urlopen(self._url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON to a path of the API; returns the JSON it answers with, None if it answers with nothing."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def object_info(self, name: str) -> dict[str, Any]:
        """What ComfyUI tells its frontend about a node class. KeyError if it knows none of that name."""
        return self.get(f"/object_info/{name}")[name]

    def queue(self, prompt: Mapping[str, Any]) -> str:
        """Queue a prompt in API format; returns its id. PromptFailed if ComfyUI rejects it, with the node errors."""
        try:
            return self.post("/prompt", {"prompt": self._with_context(prompt)})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptFailed(f"ComfyUI rejected the prompt: {error.read().decode()}") from None

    def _with_context(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """``prompt`` with room for what CUDA itself takes in the limits of tiny models. Those that are to be refused stay."""

        def limit(value: Any) -> Any:
            return value + CONTEXT_GIB if TOO_SMALL_GIB < value < CONTEXT_GIB else value

        if not self.host.cuda:
            return dict(prompt)
        return {
            number: {
                **node,
                "inputs": {k: limit(v) if k == "max_vram_gb" else v for k, v in node["inputs"].items()},
            }
            for number, node in prompt.items()
        }

    def wait(self, prompt_id: str, timeout: float = 120, *, check: bool = True) -> dict[str, Any]:
        """The prompt's history entry, once it is done. With `check`, PromptFailed unless it succeeded."""
        deadline = time.monotonic() + timeout
        while not (history := self.get(f"/history/{prompt_id}")):
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the prompt is not done after {timeout:g} s\n{self._log_tail()}")
            time.sleep(POLL_SECONDS)
        entry = history[prompt_id]
        if check and entry["status"]["status_str"] != "success":
            raise PromptFailed(_failure(entry), entry)
        return entry

    def run(self, prompt: Mapping[str, Any], timeout: float = 120, *, check: bool = True) -> dict[str, Any]:
        """Queue a prompt and wait for it; see `wait`."""
        return self.wait(self.queue(prompt), timeout, check=check)

    def interrupt(self) -> None:
        """Ask the running prompt to stop. ComfyUI looks at this between nodes and between sampling steps."""
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True, timeout: float = 60) -> None:
        """Unload all models and, with `free_memory`, forget all cached node outputs, once a running prompt is done.

        A prompt that is queued after this returns starts after the memory was freed.
        """
        body = {"unload_models": unload_models, "free_memory": free_memory}
        deadline = time.monotonic() + timeout
        asked = 0.0
        while not asked or self.get("/helper_nodes/pending_flags"):
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"ComfyUI did not free memory in {timeout:g} s\n{self._log_tail()}")
            if now - asked > 2:
                # asked while it was between two prompts, ComfyUI's worker sleeps on: ask again, which wakes it
                self.post("/free", body)
                asked = now
            time.sleep(POLL_SECONDS)


def _failure(entry: Mapping[str, Any]) -> str:
    for name, data in entry["status"]["messages"]:
        if name == "execution_interrupted":
            return f"interrupted in node {data['node_id']} ({data['node_type']})"
        if name == "execution_error":
            what = f"{data['exception_type']}: {data['exception_message']}"
            return f"node {data['node_id']} ({data['node_type']}) raised {what}\n{''.join(data['traceback'])}"
    return f"the prompt failed: {entry['status']}"
