"""The example workflows on a running ComfyUI with WanVideoWrapper: accepted as soon as the files are there that their notes
name, and run, small, on tiny checkpoints under those names.

What the tests leave out is what a CPU and a tiny checkpoint cannot do: text encoders and VAEs, whose sizes are fixed in the
hosts' code, and torch.compile. Noise in their place comes from the helper nodes.
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
from .checkpoints import write_lora, write_wan
from .comfy import ComfyServer, Host, PromptFailed
from .wanvideo import LORA_LAYERS, node, why_not_loaded, write_quantized

pytestmark = pytest.mark.host

FILES = ui.files()
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# ComfyUI takes the width in heads of 128, WanVideoWrapper in 12 heads and 30 blocks
SHAPE = {"dim": 384, "ffn_dim": 640, "blocks": 30}
SMALL = {"width": 64, "height": 64, "length": 5, "num_frames": 5, "steps": 2, "base_precision": "fp32"}
HALF = {"start_at_step", "end_at_step", "start_step", "end_step"}
WHOLE = (0, -1, 10_000)
ENCODED = {
    "CLIPTextEncode": node("TestConditioning", seed=1, tokens=16, dim=4096, pooled_dim=0),
    "WanVideoTextEncodeCached": node("TestWanVideoTextEmbeds", seed=1, tokens=16),
}
DECODERS = ("VAEDecode", "VAEDecodeTiled", "WanVideoDecode")
LEFT_OUT = ("CLIPLoader", "VAELoader", "WanVideoVAELoader", "WanVideoTorchCompileSettings", "CreateVideo", "SaveVideo")
RUN = (
    *("01_start_here_any_card", "02_high_quality_with_plan_24gb", "03_two_experts_fast_16gb"),
    *("06_fp8_loader_with_swap_12gb", "07_save_quantized_model", "08_compare_quantized_model"),
    *("09_wanvideo_fast_preview_any_card", "10_wanvideo_standard_16gb", "11_wanvideo_memory_optimized_12gb"),
    *("12_wanvideo_two_experts_20gb", "13_wanvideo_speed_optimized_24gb"),
)


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
    write_named_models(base / "models")
    with ComfyServer(comfy_host, base, packs=[wrapper], env={"INTELLIGENT_VRAM_FORCE": "1"}) as server:
        yield start(server, comfy_host)


def write_named_models(folder: Path) -> None:
    """Write one tiny Wan model, scaled FP8 where the name says so, and one LoRA, under all names of the workflows."""
    plain = write_wan(folder / "plain.safetensors", **SHAPE, dtype=torch.float32)
    fp8 = write_quantized(folder / "fp8.safetensors", plain)
    lora = write_lora(folder / "lora.safetensors", plain, LORA_LAYERS)
    for path in FILES:
        for name, model in ui.models(ui.read(path)).items():
            target = folder / model["directory"] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if model["directory"] == "loras":
                source = lora
            elif model["directory"] == "diffusion_models":
                source = fp8 if "fp8" in name else plain
            else:
                continue
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
    """The same prompt at 64 x 64, 5 frames and 2 steps, without text encoders and VAEs; its latents are saved."""
    removed = {name for name, entry in prompt.items() if entry["class_type"] in LEFT_OUT}
    latents = {}
    for name, entry in prompt.items():
        if entry["class_type"] in DECODERS:
            latents[name] = entry["inputs"]["samples"]
    result = {}
    for name, entry in prompt.items():
        if name in removed or name in latents:
            continue
        inputs = {}
        for key, value in ENCODED.get(entry["class_type"], entry)["inputs"].items():
            source = value[0] if isinstance(value, list) else None
            if source in removed:
                continue
            if key in SMALL:
                value = SMALL[key]
            elif key in HALF and value not in WHOLE:
                value = 1
            inputs[key] = latents.get(source, value)
        result[name] = node(ENCODED.get(entry["class_type"], entry)["class_type"], **inputs)
    for name, samples in latents.items():
        result[name] = node("TestSaveLatent", samples=samples, path=f"{name}.safetensors")
    return result


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in RUN], ids=lambda path: path.stem)
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
        elif node_["class_type"] == "TestSaveLatent":
            assert Path(outputs[name]["text"][0]).is_file()
            assert "block swap" in log
        elif node_["class_type"] == "SaveQuantizedModel":
            assert (
                outputs[name]["text"][1] in tiny.server.object_info("UNETLoader")["input"]["required"]["unet_name"][0]
            )
