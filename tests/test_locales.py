"""What ComfyUI's front end is told in English and Chinese: complete, without what is gone, and in English what the nodes say.

`python tests/test_locales.py` writes locales/en/nodeDefs.json anew from the nodes.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
LANGUAGES = ("en", "zh")
FILES = ("main.json", "nodeDefs.json", "settings.json")
# Vue I18n reads these as places to fill in, links and plurals. A text with one of them is not translated: without an entry the
# front end shows the node's own.
SYNTAX = re.compile(r"[{}@|]")
HAN = re.compile(r"[\u4e00-\u9fff]")


@contextmanager
def without_a_host() -> Iterator[None]:
    """Let nodes declare their inputs where no ComfyUI can be imported: with no model files to choose from."""
    names = [f"intelligent_vram.vram.hosts.{name}" for name in ("planning", "comfy_quant")]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    for name in names:
        sys.modules[name] = stand_in = ModuleType(name)
        stand_in.model_names = lambda: ["model.safetensors"]
        stand_in.COMPUTE = ("tensor cores", "dequantize")
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)


def told_by_the_nodes() -> dict[str, Any]:
    """What the nodes say of themselves, as the front end's nodeDefs.json has it."""
    nodes = importlib.import_module("intelligent_vram.nodes")
    with without_a_host():
        return {name: _told(name, node, nodes) for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items())}


def _told(name: str, node: Any, nodes: ModuleType) -> dict[str, Any]:
    inputs = {}
    for group in node.INPUT_TYPES().values():
        for key, (_, *options) in group.items():
            inputs[key] = _entry(key, options[0]["tooltip"])
    names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    outputs = {str(i): _entry(*pair) for i, pair in enumerate(zip(names, node.OUTPUT_TOOLTIPS, strict=True))}
    return {
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS[name],
        "description": node.DESCRIPTION,
        "inputs": inputs,
        "outputs": outputs,
    }


def _entry(name: str, tooltip: str) -> dict[str, str]:
    return {"name": name} if SYNTAX.search(tooltip) else {"name": name, "tooltip": tooltip}


def read(language: str, file: str) -> Any:
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def paths(value: Any, path: str = "") -> dict[str, str]:
    """The texts of nested objects, by the path to each."""
    if isinstance(value, str):
        return {path: value}
    return {key: text for name, child in value.items() for key, text in paths(child, f"{path}/{name}").items()}


def test_english_is_what_the_nodes_say() -> None:
    assert read("en", "nodeDefs.json") == told_by_the_nodes(), "run: python tests/test_locales.py"


@pytest.mark.parametrize("file", FILES)
def test_chinese_has_every_entry_of_english_and_no_other(file: str) -> None:
    english, chinese = paths(read("en", file)), paths(read("zh", file))
    assert sorted(english.keys() - chinese.keys()) == []
    missing_from_english = chinese.keys() - english.keys()
    # a text that cannot be an entry in English, because of its characters, may be one in Chinese
    assert sorted(key for key in missing_from_english if not key.endswith("/tooltip")) == []
    assert {key.removesuffix("/tooltip") + "/name" for key in missing_from_english} <= english.keys()


@pytest.mark.parametrize("file", FILES)
def test_chinese_is_chinese(file: str) -> None:
    same = {"INT", "FLOAT"}
    assert [key for key, text in paths(read("zh", file)).items() if not HAN.search(text) and text not in same] == []


def test_chinese_keeps_the_numbers_and_names_of_the_english_texts() -> None:
    english, chinese = paths(read("en", "nodeDefs.json")), paths(read("zh", "nodeDefs.json"))
    token = re.compile(r"[a-z]+(?:_[a-z0-9]+)+|\b\d+(?:\.\d+)?\b")
    changed = {}
    for key, text in english.items():
        if key.endswith(("/tooltip", "/description")):
            lost = set(token.findall(text)) - set(token.findall(re.sub(HAN, " ", chinese[key])))
            if lost:
                changed[key] = lost
    assert changed == {}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", FILES)
def test_no_text_holds_what_the_front_end_would_fill_in(language: str, file: str) -> None:
    texts = paths(read(language, file))
    assert [key for key, text in texts.items() if SYNTAX.search(text)] == []
    assert [key for key, text in texts.items() if not text.strip()] == []


def test_the_category_of_the_nodes_has_a_name() -> None:
    nodes = importlib.import_module("intelligent_vram.nodes")
    categories = {part for node in nodes.NODE_CLASS_MAPPINGS.values() for part in node.CATEGORY.split("/")}
    for language in LANGUAGES:
        assert read(language, "main.json")["nodeCategories"].keys() == categories


def test_every_setting_of_the_front_end_is_told_as_its_code_has_it() -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "web").glob("**/*.js")))
    settings, categories = read("en", "settings.json"), read("en", "main.json")["settingsCategories"]
    # the front end writes the dots of an id as underscores
    assert {id.replace(".", "_") for id in re.findall(r"[\"'](IntelligentVRAM\.\w+)[\"']", code)} == settings.keys()
    texts = [*paths(settings).values(), *categories]
    assert [text for text in texts if f'"{text}"' not in code] == []


def test_every_node_has_a_help_page_in_both_languages_that_names_all_inputs_and_outputs() -> None:
    pages = ROOT / "web" / "docs"
    told = told_by_the_nodes()
    for name, node in told.items():
        for page in (pages / f"{name}.md", pages / name / "zh.md"):
            text = page.read_text(encoding="utf-8")
            outputs = {entry["name"] for entry in node["outputs"].values()}
            assert [part for part in {*node["inputs"], *outputs} if f"`{part}`" not in text] == [], page
    assert {page.stem for page in pages.glob("*.md")} == told.keys()
    assert {page.parent.name for page in pages.glob("*/*.md")} == told.keys()


if __name__ == "__main__":
    text = json.dumps(told_by_the_nodes(), indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
