"""Weights kept encoded, in a real ComfyUI and under the real WanVideoWrapper: the same latents to the bit, run after run."""

import re

import pytest
import torch
from intelligent_vram.quant.lossless import compress_file

from .comfy import ComfyServer
from .test_block_swap import MODES, latent
from .test_block_swap import swap as comfy_swap
from .test_quantized import plain, sample
from .test_wanvideo import by
from .test_wanvideo import swap as wan_swap
from .wanvideo import Sampler
from .workflows import Patch, lora

pytestmark = pytest.mark.host


def swap(mode: str = "adaptive") -> Patch:
    kind, inputs = comfy_swap(mode)
    return kind, {**inputs, "lossless": "on"}


def encodings(log: str) -> int:
    """How often weights were encoded in a part of the log."""
    return len(re.findall(r"weights encoded without loss in", log))


@pytest.mark.parametrize("mode", MODES)
def test_the_latent_is_the_same_and_weights_are_encoded_once(comfy_server: ComfyServer, wan: str, mode: str) -> None:
    expected = latent(comfy_server, wan, steps=4, cfg=3.0, weight_dtype="fp8_e4m3fn")
    comfy_server.free()
    start = len(comfy_server.log_text())
    for seed in (0, 0, 1):
        streamed = latent(
            comfy_server, wan, steps=4, cfg=3.0, weight_dtype="fp8_e4m3fn", seed=seed, between=[swap(mode)]
        )
        assert torch.equal(streamed, expected) is (seed == 0)
    assert encodings(comfy_server.log_text()[start:]) == 1
    # and without the node it is the loader's model again
    assert torch.equal(latent(comfy_server, wan, steps=4, cfg=3.0, weight_dtype="fp8_e4m3fn"), expected)


def test_loras_count_once_with_encoded_weights_too(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    for strength in (0.7, 0.3):
        expected = latent(comfy_server, wan, between=[lora(wan_lora, strength)])
        assert torch.equal(latent(comfy_server, wan, between=[lora(wan_lora, strength), swap()]), expected)


@pytest.mark.parametrize("way", ["between", "swap"])
@pytest.mark.parametrize("kind", ["plain", "vace", "fp8", "gguf"])
def test_wanvideo_samples_the_same_run_after_run(sampler: Sampler, kind: str, way: str) -> None:
    expected = sampler.reference(kind)
    for _ in range(2):
        assert torch.equal(sampler.sample(kind, **by(way, wan_swap(kind, lossless="on"))).latent, expected)
    assert torch.equal(sampler.sample(kind).latent, expected)


@pytest.mark.parametrize("swap_mode", [None, "adaptive"])
def test_an_encoded_file_is_the_same_model(comfy_server: ComfyServer, wan: str, swap_mode: str | None) -> None:
    folder = comfy_server.models / "diffusion_models"
    target = folder / "encoded.safetensors"
    compress_file(folder / wan, target, torch.device("cpu"), overwrite=True)
    try:
        assert target.stat().st_size < 0.95 * (folder / wan).stat().st_size
        comfy_server.object_info("QuantizedModelLoader")
        streamed, told = sample(comfy_server, target.name, "none", swap_mode=swap_mode)
        assert "encoded without loss" in told
        assert torch.equal(streamed, plain(comfy_server, wan))
        again, _ = sample(comfy_server, target.name, "none", swap_mode=swap_mode, between=[swap()])
        assert torch.equal(again, streamed)
    finally:
        comfy_server.free()
        target.unlink()
