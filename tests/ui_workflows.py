"""Workflows as ComfyUI's front end saves them: read, checked and turned into prompts.

A node's `widgets_values` are a list without names: one value for each of its inputs that has a widget, in the order in
which the node declares them, and one more for what the front end adds (a seed's "control after generate", an upload button).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
OURS = "comfyui-intelligentvram"
NOTES = ("MarkdownNote", "Note")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO)


def files() -> list[Path]:
    """The example workflows of this pack."""
    return sorted(FOLDER.glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    """The workflow in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def nodes(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The nodes that run: all but the notes."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def note(workflow: Mapping[str, Any]) -> str:
    """The text of all notes."""
    return "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES)


def models(workflow: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The model files that the nodes name, by name: each with its `url` and the `directory` it goes to."""
    return {model["name"]: model for node in nodes(workflow) for model in node["properties"].get("models", [])}


def declared(inputs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of each input of a node, from its INPUT_TYPES or from `/object_info`'s `input`."""
    for section in ("required", "optional"):
        for name, specification in inputs.get(section, {}).items():
            yield name, specification[0], specification[1] if len(specification) > 1 else {}


def has_widget(kind: Any) -> bool:
    """Whether the front end shows a widget for an input of this type; other inputs are sockets only."""
    return isinstance(kind, (list, tuple)) or kind in WIDGETS


def named_files(workflow: Mapping[str, Any]) -> set[str]:
    """The model files that are chosen in a node."""
    values = [value for node in nodes(workflow) for value in node.get("widgets_values") or []]
    return {value for value in values if isinstance(value, str) and value.endswith(".safetensors")}


def widget_values(node: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A node's widgets with their values, as the front end restores them: values beyond the widgets are dropped, and
    widgets beyond the values get their defaults."""
    values = iter(node.get("widgets_values") or [])
    return {name: value for entry in declared(inputs) for name, value in _restored(*entry, values)}


def _restored(name: str, kind: Any, options: Mapping[str, Any], values: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    if not has_widget(kind):
        return
    value = next(values, default_of(kind, options))
    yield name, value
    if kind == DYNAMIC_COMBO:
        chosen = next(option for option in options["options"] if option["key"] == value)
        for inner, inner_kind, inner_options in declared(chosen["inputs"]):
            yield from _restored(f"{name}.{inner}", inner_kind, inner_options, values)
    if options.get("control_after_generate", name in ("seed", "noise_seed") and kind == "INT"):
        next(values, None)
    if options.get("image_upload"):
        next(values, None)


def default_of(kind: Any, options: Mapping[str, Any]) -> Any:
    """What the widget of an input shows in a new node."""
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
    if choices:
        return choices[0]["key"] if kind == DYNAMIC_COMBO else choices[0]
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False, "STRING": ""}.get(str(kind))


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow in the format of ComfyUI's API, as the front end would queue it, for a host's `/object_info`."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in nodes(workflow):
        inputs = widget_values(node, object_info[node["type"]]["input"])
        for entry in node.get("inputs", []):
            if entry.get("link") is not None:
                inputs[entry["name"]] = links[entry["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
