"""The example workflows in ComfyUI's front end: found in the template browser, opened without a missing node or an error, and
queued as the host tests queue them.

With `INTELLIGENT_VRAM_THUMBNAILS` set to a folder, the pictures of the template browser are written there anew.
"""

import copy
import io
import os
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .. import ui_workflows as ui
from ..host.comfy import PACK_NAME, ComfyServer
from ..host.wanvideo import find_wrapper, why_not_loaded
from .conftest import front_end, hosts, name
from .pages import NODES_2, NODES_2_SINCE, Panel

pytestmark = pytest.mark.host

FILES = ui.files()
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# a thumbnail shows this much of the graph, from the left and the top of the first group of our nodes
REGION, MARGIN = (1120, 840), (335, 20)
CLIP = {"x": 200, "y": 110, "width": 960, "height": 720}
THUMBNAIL = (480, 360)
LACKING = "Failed to load resource"
STATE = """
const nodes = app.graph._nodes;
return nodes.map((node) => ({
    id: Number(node.id),
    known: Boolean(globalThis.LiteGraph.registered_node_types[node.type]),
    red: Boolean(node.has_errors),
    size: Array.from(node.size),
    pos: Array.from(node.pos),
    widgets: Object.fromEntries(
        (node.widgets ?? []).filter((w) => w.serialize !== false).map((w) => [w.name, w.value])),
}));
"""


BOXES = """
return app.graph._nodes.map(({title, pos, size}) => ({
    title, left: pos[0], right: pos[0] + size[0], top: pos[1] - globalThis.LiteGraph.NODE_TITLE_HEIGHT, bottom: pos[1] + size[1],
}));
"""


@pytest.fixture(scope="module", params=hosts(), ids=name)
def gallery(
    request: pytest.FixtureRequest, browser: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Panel]:
    """The page of a ComfyUI with WanVideoWrapper that lists the model files of the workflows, which are empty."""
    host = request.param
    if isinstance(host, str):
        pytest.skip(host)
    wrapper = find_wrapper(host)
    if isinstance(wrapper, str):
        pytest.skip(wrapper)
    base = tmp_path_factory.mktemp("templates")
    for path in FILES:
        for model in ui.models(ui.read(path)).values():
            file = base / "models" / model["directory"] / model["name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    static = front_end(host, tmp_path_factory.mktemp("front_end"))
    args = [] if static is None else ["--front-end-root", str(static)]
    with ComfyServer(host, base, args=args, packs=[wrapper]) as server:
        problem = why_not_loaded(server)
        if problem is not None:
            pytest.skip(problem)
        shutil.copy(host.root / "input" / "example.png", base / "input")
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
        context = browser.new_context(viewport={"width": 1400, "height": 960})
        # ComfyUI's own templates may be of another version: front end 1.27 opens none of ours if it cannot list its own
        context.route("**/templates/index*.json", lambda route: route.fulfill(json=[]))
        yield Panel(context, server, None)
        context.close()


@pytest.fixture
def console(gallery: Panel) -> Iterator[list[str]]:
    """What the page writes to the console as an error, and exceptions, during a test. Either fails the test; files that the
    host or another pack lacks do not, such as the pictures of their own templates."""
    errors: list[str] = []

    def note(message: Any) -> None:
        lacking = message.text.startswith(LACKING) and PACK_NAME not in message.location.get("url", "")
        if message.type == "error" and not lacking:
            errors.append(message.text)

    def fail(error: object) -> None:
        errors.append(str(error))

    gallery.page.on("console", note)
    gallery.page.on("pageerror", fail)
    yield errors
    gallery.page.remove_listener("console", note)
    gallery.page.remove_listener("pageerror", fail)
    assert errors == []


def opened(gallery: Panel, workflow: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Open a workflow; its nodes by id, as the graph has them."""
    gallery.script("await app.loadGraphData(argument)", workflow)
    gallery.page.wait_for_timeout(500)
    return {node["id"]: node for node in gallery.script(STATE)}


@each
def test_it_opens_whole_and_queues_what_it_says(gallery: Panel, console: list[str], path: Path) -> None:
    workflow = ui.read(path)
    state = opened(gallery, workflow)
    assert set(state) == {node["id"] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        now = state[node["id"]]
        assert now["known"], node["type"]
        assert not now["red"], node["type"]
        assert now["pos"] == node["pos"], node["type"]
        assert now["size"][1] <= node["size"][1] + 1, f"{node['type']} is higher than its place"
        saved = node.get("widgets_values_named", {})
        # what older hosts' nodes do not have yet is left out
        assert now["widgets"] == {name: saved.get(name) for name in now["widgets"]} or node["type"] in ui.NOTES
    queued = gallery.script("return (await app.graphToPrompt()).output")
    assert set(queued) == {str(node["id"]) for node in ui.nodes(workflow)}
    for key, entry in ui.to_prompt(workflow, gallery.server.get("/object_info")).items():
        # Preview as Text also queues what it shows
        shown = set(queued[key]["inputs"]) - set(entry["inputs"])
        assert not shown or entry["class_type"] == "PreviewAny"
        assert {name: value for name, value in queued[key]["inputs"].items() if name not in shown} == entry["inputs"]
    keep_thumbnail(gallery, path)


@each
def test_no_node_covers_another_in_nodes_2(gallery: Panel, console: list[str], path: Path) -> None:
    """Nodes that are elements of the page are higher than those drawn on the canvas."""
    if gallery.server.host.version < NODES_2_SINCE:
        pytest.skip("the front end has no Nodes 2.0")
    gallery.set(NODES_2, True)
    try:
        opened(gallery, ui.read(path))
        gallery.page.wait_for_selector(".lg-node")
        gallery.page.wait_for_timeout(1000)
        boxes = gallery.script(BOXES)
    finally:
        gallery.set(NODES_2, False)
    covered = {
        (first["title"], second["title"])
        for first, second in combinations(boxes, 2)
        if all(
            first[low] < second[high] and second[low] < first[high]
            for low, high in (("left", "right"), ("top", "bottom"))
        )
    }
    assert covered == set()


def test_nodes_saved_without_their_last_input_open_with_its_default(gallery: Panel, console: list[str]) -> None:
    """The front end restores widgets by position: what is added behind the others leaves them as they were saved."""
    workflow = copy.deepcopy(ui.read(next(path for path in FILES if path.stem.startswith("11_"))))
    saved = {node["id"]: node for node in workflow["nodes"]}
    ours = {
        i
        for i, node in saved.items()
        if node["properties"].get("cnr_id") == ui.OURS and len(node["widgets_values"]) > 1
    }
    newest = {}
    for identity in ours:
        node = saved[identity]
        newest[identity] = list(node["widgets_values_named"])[-1]
        node["widgets_values"].pop()
        del node["widgets_values_named"][newest[identity]]
        node["inputs"] = [entry for entry in node["inputs"] if entry["name"] != newest[identity]]
    state = opened(gallery, workflow)
    info = gallery.server.get("/object_info")
    assert ours
    for identity in ours:
        node = saved[identity]
        declared = {name: rest for name, *rest in ui.declared(info[node["type"]]["input"])}
        expected = node["widgets_values_named"] | {newest[identity]: ui.default_of(*declared[newest[identity]])}
        assert state[identity]["widgets"] == expected


def test_the_template_browser_shows_and_opens_them(gallery: Panel, console: list[str]) -> None:
    page = gallery.page
    gallery.script("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK_NAME).first.click(timeout=20_000)
    for path in FILES:
        card = page.get_by_test_id(f"template-workflow-{path.stem}")
        card.scroll_into_view_if_needed(timeout=20_000)
        picture = card.locator("img").first
        picture.wait_for(timeout=20_000)
        gallery.until(lambda picture=picture: picture.evaluate("image => image.naturalWidth") == THUMBNAIL[0])
    page.get_by_test_id(f"template-workflow-{FILES[0].stem}").click()
    expected = {node["id"] for node in ui.read(FILES[0])["nodes"]}
    gallery.until(lambda: {node["id"] for node in gallery.script(STATE)} == expected)


def keep_thumbnail(gallery: Panel, path: Path) -> None:
    """Write the picture of an opened workflow, where it is wanted, from the first of the front ends."""
    folder = os.environ.get("INTELLIGENT_VRAM_THUMBNAILS")
    if not folder or gallery.server.host != hosts()[0]:
        return
    group = next(group for group in ui.read(path)["groups"] if group["title"] == "Intelligent VRAM")
    left, top = (group["bounding"][axis] - MARGIN[axis] for axis in (0, 1))
    gallery.script(
        "const [x, y, left, top, scale] = argument; const canvas = app.canvas;"
        "const origin = canvas.canvas.getBoundingClientRect(); canvas.ds.scale = scale;"
        "canvas.ds.offset = [(x - origin.left) / scale - left, (y - origin.top) / scale - top];"
        "canvas.setDirty(true, true)",
        [CLIP["x"], CLIP["y"], left, top, CLIP["width"] / REGION[0]],
    )
    gallery.page.wait_for_timeout(800)
    with Image.open(io.BytesIO(gallery.page.screenshot(clip=CLIP))) as picture:
        small = picture.convert("RGB").resize(THUMBNAIL, Image.Resampling.LANCZOS)
    small.save(Path(folder) / f"{path.stem}.jpg", quality=85, optimize=True)
