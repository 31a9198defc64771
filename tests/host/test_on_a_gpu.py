"""A model of the size of Wan 1.3B in a real ComfyUI on a GPU, while another program takes its memory and frees it at random."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..gpu.hog import hog
from .checkpoints import write_wan
from .comfy import ComfyServer, Host
from .test_block_swap import MODES
from .test_block_swap import swap as comfy_swap
from .test_wanvideo import swap as wan_swap
from .wanvideo import sample_video, why_not_loaded
from .workflows import saved_latent, text_to_video

pytestmark = [
    pytest.mark.host,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GIB = 1 << 30
LEAST, MOST = GIB, 4 * GIB  # that the other program leaves
SIZE = {"width": 512, "height": 320}  # with 25 frames 4,480 tokens
ANSWERS = ("gave back", "it is repeated with less")


@pytest.fixture(scope="module")
def server(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI with such a model, and with the wrapper."""
    if not comfy_host.cuda:
        pytest.skip("this ComfyUI computes on a CPU")
    base = tmp_path_factory.mktemp("real_size")
    write_wan(base / "models" / "diffusion_models" / "large.safetensors", dim=1536, ffn_dim=8960, blocks=30)
    with ComfyServer(comfy_host, base, packs=[wrapper]) as running:
        yield running


def run(server: ComfyServer, prompt: dict[str, Any]) -> torch.Tensor:
    return saved_latent(server.run(prompt, timeout=300)).clone()


@pytest.mark.parametrize("mode", MODES)
def test_comfyui_samples_the_same_latent_beside_another_program(server: ComfyServer, mode: str) -> None:
    def prompt(seed: int, *between: Any) -> dict[str, Any]:
        return text_to_video("large.safetensors", between=between, seed=seed, steps=40, length=25, **SIZE)

    node = comfy_swap(mode, max_vram_gb=0.0, block_size_mb=270)
    expected = [run(server, prompt(seed)) for seed in (0, 1)]
    assert torch.equal(run(server, prompt(0, node)), expected[0])
    start = len(server.log_text())
    for seed in (1, 0):
        with hog(seed, LEAST, MOST):
            assert torch.equal(run(server, prompt(seed, node)), expected[seed])
    told = [line for line in server.log_text()[start:].splitlines() if any(words in line for words in ANSWERS)]
    print(f"\n{mode}: " + "\n".join(told[:4]))
    server.free()
    gc.collect()


@pytest.mark.parametrize("mode", MODES)
def test_wanvideowrapper_samples_the_same_latent_beside_another_program(server: ComfyServer, mode: str) -> None:
    if (problem := why_not_loaded(server)) is not None:
        pytest.skip(problem)

    def prompt(seed: int, **scene: Any) -> dict[str, Any]:
        return sample_video(
            "large.safetensors", base_precision="bf16", seed=seed, steps=40, num_frames=25, **SIZE, **scene
        )

    node = wan_swap(mode=mode, max_vram_gb=0.0, block_size_mb=270)
    expected = [run(server, prompt(seed, swap=node)) for seed in (0, 1)]
    start = len(server.log_text())
    for seed in (0, 1):
        with hog(seed, LEAST, MOST):
            assert torch.equal(run(server, prompt(seed, swap=node)), expected[seed])
    told = [line for line in server.log_text()[start:].splitlines() if any(words in line for words in ANSWERS)]
    print(f"\n{mode}: " + "\n".join(told[:4]))
    server.free()
