"""A browser on the front end of each ComfyUI of this machine. Without a browser or a ComfyUI the tests are skipped.

The ComfyUI are the one of the host tests and those whose folders are in `COMFYUI_MORE_PATHS`, by default
`ComfyUI-0.3.64` beside the first. Each gets the front end that its requirements.txt names; where another one is installed
it is downloaded. Screenshots are kept in the folder `INTELLIGENT_VRAM_SCREENSHOTS`, by ComfyUI's version.
"""

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from ..host.checkpoints import write_wan
from ..host.comfy import ComfyServer, Host, find_host
from .pages import Panel

PACKAGE = "comfyui_frontend_package"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def hosts() -> list[Host | str]:
    """Each ComfyUI of this machine; or why there is none."""
    first = find_host()
    if isinstance(first, str):
        return [first]
    chosen = os.environ.get("COMFYUI_MORE_PATHS", str(first.root.parent / "ComfyUI-0.3.64"))
    found: list[Host | str] = [first]
    for folder in filter(os.path.isdir, chosen.split(os.pathsep)):
        with mock.patch.dict(os.environ, COMFYUI_PATH=folder):
            found.append(find_host())
    return found


def name(host: Host | str) -> str:
    return "none" if isinstance(host, str) else "ComfyUI-" + ".".join(map(str, host.version))


def front_end(host: Host, folder: Path) -> Path | None:
    """Where the front end lies that ``host`` asks for; None: it is the installed one. Skips the test if there is no way to
    get it."""
    wanted = re.search(r"comfyui-frontend-package==([\d.]+)", (host.root / "requirements.txt").read_text())[1]
    question = f"import importlib.metadata as m; print(m.version('{PACKAGE}'))"
    installed = subprocess.run([host.python, "-c", question], capture_output=True, text=True).stdout.strip()
    if installed == wanted:
        return None
    command = [host.python, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"{PACKAGE}=={wanted}"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"front end {wanted} is not installed and cannot be downloaded")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / PACKAGE / "static"


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A headless Chromium: the one that is installed, else Playwright's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session", params=hosts(), ids=name)
def server(
    request: pytest.FixtureRequest, browser: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A running ComfyUI with a model of 40 blocks, in which this pack's nodes act on a CPU too."""
    host = request.param
    if isinstance(host, str):
        pytest.skip(host)
    base = tmp_path_factory.mktemp("browser")
    static = front_end(host, tmp_path_factory.mktemp("front_end"))
    write_wan(base / "models" / "diffusion_models" / "wan.safetensors", blocks=40)
    args = [] if static is None else ["--front-end-root", str(static)]
    with ComfyServer(host, base, args=args, env={"INTELLIGENT_VRAM_FORCE": "1"}) as running:
        running.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False})
        yield running


@pytest.fixture
def page(browser: object, server: ComfyServer, request: pytest.FixtureRequest) -> Iterator[Panel]:
    """ComfyUI's page in a profile of its own. An error of this pack in the console fails the test."""
    server.post("/settings", {"Comfy.ColorPalette": "dark", "Comfy.Locale": "en", "IntelligentVRAM.Panel": True})
    folder = os.environ.get("INTELLIGENT_VRAM_SCREENSHOTS")
    context = browser.new_context(viewport={"width": 1400, "height": 960})
    opened = Panel(context, server, Path(folder) / name(server.host) if folder else None)
    yield opened
    context.close()
    assert not opened.errors
