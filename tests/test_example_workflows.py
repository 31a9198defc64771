"""The example workflows: whole, tidy, in step with this pack's nodes, and with a note that says what they need."""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from . import ui_workflows as ui

FILES = ui.files()
COMPUTE = ("tensor cores", "dequantize")
HEADINGS = ("## What it is for", "## What to change", "## Models")
TITLE_HEIGHT = 30
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def our_nodes() -> Iterator[dict[str, dict[str, Any]]]:
    """The inputs of this pack's nodes by class name, on a machine without ComfyUI and without models."""
    from intelligent_vram.nodes import NODE_CLASS_MAPPINGS

    with pytest.MonkeyPatch.context() as patch:
        for name, content in (
            ("planning", {"model_names": list}),
            ("comfy_quant", {"model_names": list, "COMPUTE": COMPUTE}),
        ):
            full = f"intelligent_vram.vram.hosts.{name}"
            module = ModuleType(full)
            vars(module).update(content)
            patch.setitem(sys.modules, full, module)
        yield {name: node.INPUT_TYPES() for name, node in NODE_CLASS_MAPPINGS.items()}


def test_there_is_a_workflow_for_each_card_and_each_host() -> None:
    names = " ".join(path.stem for path in FILES)
    assert all(
        word in names for word in ("any_card", "12gb", "16gb", "20gb", "24gb", "wanvideo", "two_experts", "vace")
    )
    types = {node["type"] for path in FILES for node in ui.nodes(ui.read(path))}
    from intelligent_vram.nodes import NODE_CLASS_MAPPINGS

    assert set(NODE_CLASS_MAPPINGS) <= types


@each
def test_the_links_are_consistent(path: Path) -> None:
    workflow = ui.read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) == workflow["last_node_id"]
    assert workflow["version"] == 0.4
    identities = [link[0] for link in workflow["links"]]
    assert len(set(identities)) == len(identities)
    assert max(identities) <= workflow["last_link_id"]
    for link, source, output, target, position, kind in workflow["links"]:
        assert nodes[target]["inputs"][position]["link"] == link
        assert link in nodes[source]["outputs"][output]["links"]
        assert kind in (nodes[source]["outputs"][output]["type"], nodes[target]["inputs"][position]["type"])
    ends = Counter(
        [entry["link"] for node in nodes.values() for entry in node.get("inputs", []) if entry.get("link")]
        + [link for node in nodes.values() for entry in node.get("outputs", []) for link in entry.get("links") or []]
    )
    assert ends == dict.fromkeys(identities, 2)


@each
def test_every_input_of_our_nodes_is_there_and_in_range(path: Path, our_nodes: dict[str, Any]) -> None:
    ours = [node for node in ui.nodes(ui.read(path)) if node["type"] in our_nodes]
    assert ours
    for node in ours:
        inputs = our_nodes[node["type"]]
        known = {name: (kind, options) for name, kind, options in ui.declared(inputs)}
        assert {entry["name"] for entry in node["inputs"]} == set(known), node["type"]
        connected = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        widgets = {name for name, (kind, _) in known.items() if ui.has_widget(kind)}
        assert set(inputs["required"]) <= widgets | connected, node["type"]
        assert list(node["widgets_values_named"].values()) == node["widgets_values"], node["type"]
        assert list(node["widgets_values_named"]) == [name for name in known if name in widgets], node["type"]
        for name, value in node["widgets_values_named"].items():
            assert_valid(f"{node['type']}.{name}", value, *known[name])


def assert_valid(name: str, value: Any, kind: Any, options: dict[str, Any]) -> None:
    if name.endswith(".model_name"):
        assert value.endswith(".safetensors"), name
    elif isinstance(kind, (list, tuple)):
        assert value in kind, name
    elif kind in ("INT", "FLOAT"):
        assert options["min"] <= value <= options["max"], name
        assert kind == "FLOAT" or isinstance(value, int), name
    else:
        assert isinstance(value, {"BOOLEAN": bool, "STRING": str}[kind]), name


@each
def test_the_note_says_what_it_is_for_what_to_change_and_which_files_it_needs(path: Path) -> None:
    workflow = ui.read(path)
    text = ui.note(workflow)
    assert all(heading in text for heading in HEADINGS)
    assert text.isascii()
    models = ui.models(workflow)
    assert ui.named_files(workflow) == set(models)
    for name, model in models.items():
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{name}")
        assert f"[{name}]({model['url']})\n  in `models/{model['directory']}`" in text
    wrapper = any(node["properties"].get("cnr_id") == "ComfyUI-WanVideoWrapper" for node in ui.nodes(workflow))
    assert ("https://github.com/kijai/ComfyUI-WanVideoWrapper" in text) == wrapper


@each
def test_the_graph_is_tidy(path: Path) -> None:
    workflow = ui.read(path)
    boxes = {node["id"]: _box(node) for node in workflow["nodes"]}
    for (a, first), (b, second) in combinations(boxes.items(), 2):
        assert not _overlap(first, second), (a, b)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    for first, second in combinations(groups, 2):
        assert not _overlap(first, second)
    for node in ui.nodes(workflow):
        assert sum(_inside(boxes[node["id"]], group) for group in groups) == 1, node["type"]
    for _, source, _, target, _, _ in workflow["links"]:
        assert boxes[source][0] <= boxes[target][0], "a link goes from right to left"


def _box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@each
def test_there_is_a_picture_of_it(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert 400 <= image.width <= 512


def test_every_picture_has_its_workflow() -> None:
    assert {path.stem for path in ui.FOLDER.iterdir()} == {path.stem for path in FILES}
    assert {path.suffix for path in ui.FOLDER.iterdir()} == {".json", ".jpg"}
