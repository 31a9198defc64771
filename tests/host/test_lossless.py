"""Weights kept encoded, in a real ComfyUI and under the real WanVideoWrapper: the same latents to the bit, run after run."""

import re
from collections.abc import Iterator

import pytest
import torch
from intelligent_vram.quant.lossless import compress_file

from .checkpoints import write_wan
from .comfy import ComfyServer, Host
from .test_block_swap import MODES, latent
from .test_block_swap import swap as comfy_swap
from .test_quantized import plain, prompt_of, sample
from .test_saving import same, saved
from .test_wanvideo import by
from .test_wanvideo import swap as wan_swap
from .wanvideo import Sampler
from .workflows import Patch, lora, text_to_video

pytestmark = pytest.mark.host


def swap(mode: str = "adaptive") -> Patch:
    return comfy_swap(mode, lossless="on")


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


@pytest.fixture(scope="module")
def bf16_server(comfy_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI that computes in the dtype of the file, which it does by itself on few devices."""
    base = tmp_path_factory.mktemp("bf16")
    with ComfyServer(comfy_host, base, args=["--bf16-unet"], env={"INTELLIGENT_VRAM_FORCE": "1"}) as server:
        yield server


def encoded_file(server: ComfyServer) -> tuple[str, str]:
    """Names of a model's file and of the same encoded."""
    source = write_wan(server.models / "diffusion_models" / "wan_plain.safetensors")
    target = source.with_name("wan_encoded.safetensors")
    compress_file(source, target, torch.device("cuda" if torch.cuda.is_available() else "cpu"), overwrite=True)
    assert target.stat().st_size < 0.95 * source.stat().st_size
    server.object_info("QuantizedModelLoader")
    return source.name, target.name


@pytest.mark.parametrize("swap_mode", [None, *MODES])
def test_an_encoded_file_is_the_same_model(bf16_server: ComfyServer, swap_mode: str | None) -> None:
    source, encoded = encoded_file(bf16_server)
    expected, start = plain(bf16_server, source), len(bf16_server.log_text())
    streamed, told = sample(bf16_server, encoded, "none", swap_mode=swap_mode)
    assert "encoded without loss" in told
    assert torch.equal(streamed, expected)
    again, _ = sample(bf16_server, encoded, "none", swap_mode=swap_mode, between=[swap()])
    assert torch.equal(again, expected)
    log = bf16_server.log_text()[start:]
    assert "no longer encoded" not in log
    assert "a forward encoded" in log
    bf16_server.free()


@pytest.mark.parametrize(
    "scene", [{}, {"between": [swap()]}, {"swap_mode": "chunkwise"}], ids=["plain", "node", "loader"]
)
def test_the_model_of_an_encoded_file_is_saved_plain(bf16_server: ComfyServer, scene: dict) -> None:
    source, encoded = encoded_file(bf16_server)
    assert same(saved(bf16_server, prompt_of(encoded, "none", **scene)), saved(bf16_server, text_to_video(source)))
    bf16_server.free()


def test_where_the_host_casts_weights_the_log_says_that_they_are_not_encoded(
    comfy_server: ComfyServer, bf16_server: ComfyServer
) -> None:
    """On a GPU that computes in the file's dtype it is not cast, whatever the host prefers."""
    _, encoded = encoded_file(comfy_server)
    start = len(comfy_server.log_text())
    streamed, _ = sample(comfy_server, encoded, "none", swap_mode="adaptive")
    cast = "no longer encoded" in comfy_server.log_text()[start:]
    assert cast != comfy_server.host.cuda
    as_loaded = comfy_server if cast else bf16_server
    assert torch.equal(streamed, plain(as_loaded, encoded_file(as_loaded)[0]))
    comfy_server.free()
