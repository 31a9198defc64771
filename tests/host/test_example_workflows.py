"""The example workflows on a running ComfyUI with WanVideoWrapper: accepted as soon as the files are there that their notes
name, and run, small, on tiny checkpoints under those names, to the video in the output folder.

What the tests leave out is what a CPU and a tiny checkpoint cannot do: text encoders, whose sizes are fixed in the hosts'
code, and torch.compile. Noise in place of texts comes from the helper nodes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import ui_workflows as ui
from .checkpoints import write_lora, write_wan, write_wan_vae
from .comfy import ComfyServer, Host, PromptFailed
from .wanvideo import LORA_LAYERS, node, why_not_loaded, write_quantized

pytestmark = pytest.mark.host

FILES = ui.files()
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# ComfyUI takes the width in heads of 128, WanVideoWrapper in 12 heads and 30 blocks
SHAPE = {"dim": 384, "ffn_dim": 640, "blocks": 30}
# by a part of a file's name, what a model has that others have not
KINDS = {"vace": {"vace_blocks": 15}, "i2v": {"image_channels": 20}}
VAE_OF_ANY_WIDTH = (0, 4)  # ComfyUI before has only one of the real width
SMALL = {"width": 64, "height": 64, "length": 5, "num_frames": 5, "steps": 2, "base_precision": "fp32"}
HALF = {"start_at_step", "end_at_step", "start_step", "end_step"}
WHOLE = (0, -1, 10_000)
ENCODED = {
    "CLIPTextEncode": node("TestConditioning", seed=1, tokens=16, dim=4096, pooled_dim=0),
    "WanVideoTextEncodeCached": node("TestWanVideoTextEmbeds", seed=1, tokens=16),
}
LEFT_OUT = ("CLIPLoader", "WanVideoTorchCompileSettings")


@dataclass(frozen=True)
class Example:
    """A server, and what it tells about all nodes."""

    server: ComfyServer
    object_info: dict[str, Any]

    def prompt(self, path: Path) -> dict[str, Any]:
        """The prompt of a workflow."""
        return ui.to_prompt(ui.read(path), self.object_info)


def start(server: ComfyServer, host: Host) -> Example:
    """What a server that has just started is for the tests; skips where it does not load the wrapper."""
    problem = why_not_loaded(server)
    if problem is not None:
        pytest.skip(problem)
    shutil.copy(host.root / "input" / "example.png", server.base / "input")
    return Example(server, server.get("/object_info"))


@pytest.fixture(scope="module")
def bare(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """A ComfyUI without a model."""
    with ComfyServer(comfy_host, tmp_path_factory.mktemp("bare"), packs=[wrapper]) as server:
        yield start(server, comfy_host)


@pytest.fixture(scope="module")
def tiny(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """A ComfyUI with tiny models under the names of the workflows, in which this pack's nodes act on a CPU too."""
    base = tmp_path_factory.mktemp("tiny")
    write_named_models(base / "models", vae_width=24 if comfy_host.version >= VAE_OF_ANY_WIDTH else 96)
    with ComfyServer(comfy_host, base, packs=[wrapper], env={"INTELLIGENT_VRAM_FORCE": "1"}) as server:
        yield start(server, comfy_host)


def write_named_models(folder: Path, *, vae_width: int) -> None:
    """Write tiny Wan models of the kinds that their names say, one LoRA and one VAE, under all names of the workflows."""
    shapes = {kind: SHAPE | more for kind, more in (("plain", {}), *KINDS.items())}
    kinds = {
        kind: write_wan(folder / f"{kind}.safetensors", **shape, dtype=torch.float32) for kind, shape in shapes.items()
    }
    quantized = {kind: write_quantized(folder / f"{kind}_fp8.safetensors", path) for kind, path in kinds.items()}
    lora = write_lora(folder / "lora.safetensors", kinds["plain"], LORA_LAYERS)
    vae = write_wan_vae(folder / "vae.safetensors", width=vae_width)
    for path in FILES:
        for name, model in ui.models(ui.read(path)).items():
            target = folder / model["directory"] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            kind = next((kind for kind in KINDS if kind in name), "plain")
            source = {
                "loras": lora,
                "vae": vae,
                "diffusion_models": (quantized if "fp8" in name else kinds)[kind],
            }.get(model["directory"])
            if source is not None:
                target.unlink(missing_ok=True)
                os.link(source, target)


def refusals(server: ComfyServer, prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """The errors with which ComfyUI refuses a prompt, none if it takes it."""
    try:
        answer = server.queue(prompt)
    except PromptFailed as error:
        told = json.loads(str(error).partition(": ")[2])
        return [problem for entry in told["node_errors"].values() for problem in entry["errors"]]
    server.wait(answer, check=False)
    return []


@each
def test_every_node_is_known(bare: Example, path: Path) -> None:
    assert {entry["type"] for entry in ui.nodes(ui.read(path))} <= set(bare.object_info)


@each
def test_it_is_refused_only_for_the_missing_model_files_and_taken_with_them(bare: Example, path: Path) -> None:
    workflow = ui.read(path)
    models = ui.models(workflow)
    for model in models.values():
        (bare.server.models / model["directory"] / model["name"]).unlink(missing_ok=True)
    prompt = bare.prompt(path)
    missing = refusals(bare.server, prompt)
    assert {problem["type"] for problem in missing} == {"value_not_in_list"}
    assert {problem["extra_info"]["received_value"] for problem in missing} == set(models)
    for model in models.values():
        (bare.server.models / model["directory"]).mkdir(exist_ok=True)
        (bare.server.models / model["directory"] / model["name"]).touch()
    assert refusals(bare.server, prompt) == []


def small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt at 64 x 64, 5 frames and 2 steps, without text encoders."""
    removed = {name for name, entry in prompt.items() if entry["class_type"] in LEFT_OUT}
    result = {}
    for name, entry in prompt.items():
        if name in removed:
            continue
        entry = ENCODED.get(entry["class_type"], entry)
        inputs = {}
        for key, value in entry["inputs"].items():
            if isinstance(value, list) and value[0] in removed:
                continue
            if key in SMALL:
                value = SMALL[key]
            elif key in HALF and value not in WHOLE:
                value = 1
            inputs[key] = value
        result[name] = node(entry["class_type"], **inputs)
    return result


@each
def test_it_runs_on_tiny_checkpoints(tiny: Example, path: Path) -> None:
    prompt = small(tiny.prompt(path))
    begin = len(tiny.server.log_text())
    entry = tiny.server.run(prompt, timeout=300)
    outputs = entry["outputs"]
    log = tiny.server.log_text()[begin:]
    for name, node_ in prompt.items():
        if node_["class_type"] == "PreviewAny":
            assert outputs[name]["text"][0]
        elif node_["class_type"] == "PreviewImage":
            assert outputs[name]["images"]
        elif node_["class_type"] == "SaveVideo":
            (video,) = outputs[name]["images"]
            assert (tiny.server.output / video["subfolder"] / video["filename"]).stat().st_size > 0
            assert "block swap" in log
        elif node_["class_type"] == "SaveQuantizedModel":
            assert (
                outputs[name]["text"][1] in tiny.server.object_info("UNETLoader")["input"]["required"]["unet_name"][0]
            )
