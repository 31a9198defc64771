"""ModelAccuracyReport in a real ComfyUI, over its HTTP API: exact zeros where nothing differs, however a model is loaded,
and errors that are there where it was quantized."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import HUNYUAN_POOLED_DIM, write_wan
from .comfy import ComfyServer, Host, PromptFailed
from .workflows import Patch, in_block, lora, saved_latent, text_to_video

pytestmark = pytest.mark.host

NODE = "ModelAccuracyReport"
SWAP: Patch = (
    "BlockSwapWrapper",
    {"max_vram_gb": 0.02, "block_size_mb": 1, "swap_mode": "adaptive", "empty_cache_freq": 0},
)


@dataclass(frozen=True)
class Told:
    """The report in lines and what there is to know of the picture."""

    lines: list[str]
    picture: dict[str, Any]

    @property
    def forward(self) -> str:
        """The line about the output."""
        assert self.lines[0].startswith("Output of one forward at sigma ")
        return self.lines[0].partition(": ")[2]

    @property
    def relative(self) -> float:
        """The relative error of the output, in percent."""
        if self.forward == "equal to the bit":
            return 0.0
        return float(re.match(r"relative error ([\d.]+)% ", self.forward)[1])

    def has(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def comparison(
    reference: str,
    other: str,
    *,
    reference_dtype: str = "default",
    dtype: str = "default",
    between: list[Patch] | None = None,
    pooled_dim: int = 0,
    **inputs: Any,
) -> dict[str, Any]:
    """Nodes `compare`, the one under test, and `tell`: a model with the nodes ``between`` against another without."""
    prompt = text_to_video(other, between=between or [], weight_dtype=dtype, pooled_dim=pooled_dim)
    model = prompt["sampler"]["inputs"]["model"]
    for name in ("sampler", "save", "negative"):
        del prompt[name]
    prompt["reference"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": reference, "weight_dtype": reference_dtype},
    }
    links = {"reference": ["reference", 0], "model": model, "positive": ["positive", 0], "latent": ["latent", 0]}
    prompt["compare"] = {"class_type": NODE, "inputs": {**links, "seed": 3, **inputs}}
    tell = {"text": ["compare", 0], "picture": ["compare", 1]}
    prompt["tell"] = {"class_type": "TestTellReport", "inputs": tell}
    return prompt


def ask(server: ComfyServer, *args: Any, **kwargs: Any) -> Told:
    """What the node tells."""
    text, picture = server.run(comparison(*args, **kwargs))["outputs"]["tell"]["text"]
    return Told(text.splitlines(), json.loads(picture))


@pytest.fixture(scope="module")
def wan_copy(comfy_server: ComfyServer, wan: str) -> str:
    """File name of a copy of `wan`."""
    folder = comfy_server.models / "diffusion_models"
    (folder / "wan_copy.safetensors").write_bytes((folder / wan).read_bytes())
    return "wan_copy.safetensors"


def write_scaled(source: Path, target: Path, *, old: bool, dtype: torch.dtype, spoil: str = "") -> str:
    """Write ``source`` with the linear layers of its blocks quantized, a scale each, in ComfyUI's present or ``old`` format;
    the scale of layer ``spoil`` is wrong by a fifth. Returns the file name."""
    weights = load_file(source)
    most = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    settings = {torch.int8: "int8_tensorwise", torch.float8_e4m3fn: "float8_e4m3fn"}[dtype]
    for key, tensor in dict(weights).items():
        layer = key.removesuffix(".weight")
        if layer == key or tensor.dim() != 2 or (not old and not key.startswith("blocks.")):
            continue
        scale = tensor.float().abs().amax() / most
        scaled = tensor.float() / scale
        weights[key] = (scaled.round() if dtype is torch.int8 else scaled).to(dtype)
        scale = scale * (1.2 if layer == spoil else 1.0)
        weights[f"{layer}.scale_weight" if old else f"{layer}.weight_scale"] = scale
        if not old:
            told = json.dumps({"format": settings, "full_precision_matrix_mult": True}).encode()
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    if old:
        weights["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    save_file(weights, target)
    return target.name


def test_every_input_and_output_is_described_for_people(comfy_server: ComfyServer) -> None:
    info = comfy_server.object_info(NODE)
    assert info["description"]
    assert info["category"] == "Intelligent VRAM"
    assert info["display_name"] == "Model Accuracy Report (Intelligent VRAM)"
    assert info["output"] == ["STRING", "IMAGE", "FLOAT"]
    assert not info["output_node"]
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    assert set(inputs) == {"reference", "model", "positive", "latent", "seed", "position"}
    assert all(value[1].get("tooltip") for value in inputs.values())
    assert len(info["output_tooltips"]) == 3


def test_a_model_against_itself_has_no_error(comfy_server: ComfyServer, wan: str, wan_copy: str) -> None:
    same, copy = ask(comfy_server, wan, wan), ask(comfy_server, wan, wan_copy)
    assert same.forward == copy.forward == "equal to the bit"
    assert same.lines[1] == "Weights: both are copies of one model in memory"
    assert copy.has("layers equal to the bit")
    assert not copy.has("%")
    assert copy.picture["shape"][2:] == [1400, 3]


@pytest.mark.parametrize("mode", ["adaptive", "layerwise"])
def test_a_streamed_model_has_no_error(comfy_server: ComfyServer, wan: str, wan_copy: str, mode: str) -> None:
    swap = (SWAP[0], {**SWAP[1], "swap_mode": mode})
    for other in (wan, wan_copy):
        told = ask(comfy_server, wan, other, between=[swap], seed=5)
        assert told.forward == "equal to the bit"
        assert not told.has("%")


def test_unscaled_fp8_is_reported(comfy_server: ComfyServer, wan: str) -> None:
    told = ask(comfy_server, wan, wan, dtype="fp8_e4m3fn")
    worse = ask(comfy_server, wan, wan, dtype="fp8_e5m2")
    assert 1 < told.relative < worse.relative < 50
    assert told.has("layers float8_e4m3fn")
    assert told.has("blocks.*.self_attn.q")
    assert told.has("largest difference")
    assert told.picture["shape"][0] == 1
    assert told.picture["shades"] > 8
    assert 0 <= told.picture["least"] < told.picture["greatest"] <= 1


def test_a_streamed_fp8_model_has_the_same_errors_as_a_loaded_one(comfy_server: ComfyServer, wan: str) -> None:
    loaded = ask(comfy_server, wan, wan, dtype="fp8_e4m3fn", seed=9)
    streamed = ask(comfy_server, wan, wan, dtype="fp8_e4m3fn", seed=9, between=[SWAP])
    assert streamed.lines == loaded.lines


def test_models_sample_as_before_afterwards(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    between = [lora(wan_lora), SWAP]
    expected = saved_latent(comfy_server.run(text_to_video(wan, seed=21)))
    patched = saved_latent(comfy_server.run(text_to_video(wan, seed=21, between=between)))
    told = ask(comfy_server, wan, wan, between=between)
    assert told.relative > 1
    assert told.has("LoRAs count in the output")
    comfy_server.run(text_to_video(wan, seed=20))
    assert torch.equal(saved_latent(comfy_server.run(text_to_video(wan, seed=21, save_as="b"))), expected)
    again = saved_latent(comfy_server.run(text_to_video(wan, seed=21, between=between, save_as="b")))
    assert torch.equal(again, patched)


def test_a_lora_on_both_is_no_error(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    prompt = comparison(wan, wan, between=[lora(wan_lora)])
    node, inputs = lora(wan_lora)
    prompt["reference lora"] = {"class_type": node, "inputs": {**inputs, "model": ["reference", 0]}}
    prompt["compare"]["inputs"]["reference"] = ["reference lora", 0]
    text, _ = comfy_server.run(prompt)["outputs"]["tell"]["text"]
    assert text.splitlines()[0].endswith("equal to the bit")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", ["int8", "fp8", "fp8 old"])
def test_a_bad_layer_of_a_quantized_file_is_warned_of(
    comfy_host: Host, comfy_server: ComfyServer, wan: str, stored: str, streamed: bool
) -> None:
    old = stored == "fp8 old"
    if not old and comfy_host.version < (0, 33):
        pytest.skip("this ComfyUI reads no such file")
    dtype = torch.int8 if stored == "int8" else torch.float8_e4m3fn
    folder = comfy_server.models / "diffusion_models"
    spoil = "blocks.2.cross_attn.k"
    name = write_scaled(folder / wan, folder / f"{stored} {streamed}.safetensors", old=old, dtype=dtype, spoil=spoil)
    told = ask(comfy_server, wan, name, between=[SWAP] if streamed else [])
    assert told.has("layers int8_tensorwise" if stored == "int8" else "layers float8_e4m3fn")
    assert 0.5 < told.relative < 30
    warnings = told.lines[told.lines.index("Warnings:") + 1 :]
    assert len(warnings) == 2
    assert warnings[0].startswith("blocks.*.cross_attn.k suffers in 1 block (2): relative error up to 20")
    assert warnings[0].endswith(r"(^|\.)blocks\.2\.cross_attn\.k$")


@pytest.mark.parametrize("position", [0.0, 0.5, 0.99])
def test_any_step_can_be_compared(comfy_server: ComfyServer, wan: str, position: float) -> None:
    told = ask(comfy_server, wan, wan, dtype="fp8_e4m3fn", position=position)
    sigma = float(re.search(r"at sigma ([\d.]+):", told.lines[0])[1])
    assert (sigma == 1.0) == (position == 0.0)
    assert told.relative > 1


def test_models_with_two_lists_of_blocks_have_two_maps(comfy_server: ComfyServer, hunyuan: str) -> None:
    told = ask(comfy_server, hunyuan, hunyuan, dtype="fp8_e4m3fn", pooled_dim=HUNYUAN_POOLED_DIM)
    assert told.has("double_blocks.*.img_attn.qkv")
    assert told.has("single_blocks.*.linear1")


def test_different_models_are_refused_with_what_differs(
    comfy_server: ComfyServer, wan: str, wan_vace: str, hunyuan: str
) -> None:
    path = comfy_server.models / "diffusion_models" / "wan_short.safetensors"
    short = write_wan(path, blocks=4).name
    try:
        for other, words in (
            (wan_vace, "WAN21_Vace"),
            (hunyuan, "HunyuanVideo"),
            (short, r"blocks\.4\.self_attn\.q\.weight is 256 x 256 in the reference and missing in the other"),
        ):
            with pytest.raises(PromptFailed, match=f"different models, which cannot be compared: .*{words}"):
                ask(comfy_server, wan, other)
    finally:
        path.unlink()


def test_a_comparison_can_be_interrupted_and_run_again(comfy_server: ComfyServer, wan: str) -> None:
    slow = in_block(0, sleep_seconds=2.0)
    start = len(comfy_server.log_text())
    prompt = comfy_server.queue(comparison(wan, wan, dtype="fp8_e4m3fn", between=[slow], seed=77))
    comfy_server.wait_log("TestRaiseInBlock: call 1", start=start)
    comfy_server.interrupt()
    with pytest.raises(PromptFailed, match=f"interrupted in node compare \\({NODE}\\)"):
        comfy_server.wait(prompt)
    assert ask(comfy_server, wan, wan, dtype="fp8_e4m3fn", seed=77).relative > 1


def test_a_forward_that_raises_leaves_the_models_whole(comfy_server: ComfyServer, wan: str) -> None:
    expected = saved_latent(comfy_server.run(text_to_video(wan, seed=31)))
    broken = in_block(2, raise_at=1)
    with pytest.raises(PromptFailed, match="raises at call 1"):
        ask(comfy_server, wan, wan, between=[broken])
    probed = comfy_server.run(text_to_video(wan, seed=30, probe=True))
    assert json.loads(probed["outputs"]["probe"]["text"][0])["hooks"] == 0
    assert torch.equal(saved_latent(comfy_server.run(text_to_video(wan, seed=31, save_as="b"))), expected)


def test_it_is_known_to_this_version(comfy_host: Host, comfy_server: ComfyServer, wan: str) -> None:
    assert comfy_host.version >= (0, 3, 64)
    assert ask(comfy_server, wan, wan, reference_dtype="fp8_e4m3fn", seed=1).relative > 1
