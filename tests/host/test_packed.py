"""The registry's archive, unpacked into the custom nodes of a ComfyUI, loads and runs."""

import json
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ..test_packaging import archive_files
from .checkpoints import write_wan
from .comfy import PACK, PACK_NAME, ComfyServer, Host, _version_of, find_host
from .workflows import saved_latent, text_to_video

pytestmark = pytest.mark.host


def hosts() -> list[Host]:
    """The ComfyUI of this machine, and others beside it in folders such as ComfyUI-0.3.64."""
    host = find_host()
    if isinstance(host, str):
        return []
    roots = sorted(path.parent for path in host.root.parent.glob("ComfyUI-[0-9]*/main.py"))
    return [host, *(replace(host, root=root, version=_version_of(root)) for root in roots if root != host.root)]


@pytest.fixture(scope="module", params=hosts() or [None], ids=lambda host: host.root.name if host else "none")
def packed_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI whose custom nodes hold the unpacked archive in place of this folder."""
    if request.param is None:
        pytest.skip(str(find_host()))
    base = tmp_path_factory.mktemp("packed")
    archive = base / "node.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in archive_files():
            file.write(PACK / path, path)
    unpacked = base / "unpacked" / PACK_NAME
    with zipfile.ZipFile(archive) as file:
        file.extractall(unpacked)
    env = {"INTELLIGENT_VRAM_FORCE": "1"}
    with ComfyServer(request.param, base, env=env, packs=[unpacked]) as server:
        yield server


def nodes() -> list[str]:
    return sorted(json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")))


def test_all_nodes_are_there_and_nothing_failed_to_load(packed_server: ComfyServer) -> None:
    for name in nodes():
        assert packed_server.object_info(name)["python_module"] == f"custom_nodes.{PACK_NAME}"
    log = packed_server.log_text()
    assert "IMPORT FAILED" not in log
    assert re.search(rf"\d seconds: .*{PACK_NAME}", log)


def test_a_prompt_runs_with_the_latent_of_the_plain_model(packed_server: ComfyServer) -> None:
    wan = write_wan(packed_server.models / "diffusion_models" / "wan.safetensors").name
    swap = {"max_vram_gb": 0.0, "block_size_mb": 1, "swap_mode": "layerwise", "empty_cache_freq": 0}
    streamed = packed_server.run(
        text_to_video(wan, between=[("BlockSwapWrapper", swap)], save_as="streamed.safetensors")
    )
    plain = packed_server.run(text_to_video(wan, save_as="plain.safetensors"))
    assert torch.equal(saved_latent(streamed), saved_latent(plain))


def test_english_texts_agree_with_what_the_host_tells_of_the_nodes(packed_server: ComfyServer) -> None:
    english = packed_server.get("/i18n")["en"]["nodeDefs"]
    for name in nodes():
        info = packed_server.object_info(name)
        assert english[name]["display_name"] == info["display_name"]
        assert english[name]["description"] == info["description"]
        inputs = {key: spec for group in ("required", "optional") for key, spec in info["input"].get(group, {}).items()}
        assert english[name]["inputs"].keys() == inputs.keys()
        for key, entry in english[name]["inputs"].items():
            assert entry.get("tooltip", inputs[key][1]["tooltip"]) == inputs[key][1]["tooltip"]
        assert [entry["name"] for entry in english[name]["outputs"].values()] == info["output_name"]


def test_chinese_texts_and_help_pages_are_served(packed_server: ComfyServer) -> None:
    chinese = packed_server.get("/i18n")["zh"]
    assert chinese["nodeDefs"].keys() >= set(nodes())
    assert {"nodeCategories", "settings"} <= chinese.keys()
    for name in nodes():
        for page in (f"{name}.md", f"{name}/zh.md"):
            with urllib.request.urlopen(
                f"{packed_server._url}/extensions/{PACK_NAME}/docs/{page}", timeout=30
            ) as answer:
                assert answer.read().startswith(b"# ")
