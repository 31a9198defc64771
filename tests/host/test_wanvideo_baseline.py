"""ComfyUI-WanVideoWrapper without a node of this pack: it samples tiny models of each kind, the same each time."""

from typing import Any

import pytest
import torch

from .comfy import PromptFailed
from .wanvideo import BLOCKS, Sampler, in_wan_block, wrapper_swap

pytestmark = pytest.mark.host


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two latents differ by more than rounding."""
    return not torch.allclose(one, other, rtol=0.01, atol=0.01)


def test_the_same_seed_gives_the_same_latent_and_another_seed_another(sampler: Sampler) -> None:
    plain = sampler.reference("plain")
    assert plain.shape == (1, 16, 2, 8, 8)
    assert plain.isfinite().all()
    assert torch.equal(sampler.sample("plain").latent, plain)
    assert far(sampler.sample("plain", seed=1).latent, plain)
    assert far(sampler.sample("plain", cfg=4.0).latent, plain)


@pytest.mark.parametrize("kind", ["plain", "vace", "fp8", "gguf"])
def test_the_wrappers_own_block_swap_changes_nothing(sampler: Sampler, kind: str) -> None:
    swapped = sampler.sample(kind, swap=wrapper_swap(20, vace_blocks_to_swap=8))
    assert torch.equal(swapped.latent, sampler.reference(kind))


def test_block_swap_can_be_set_on_a_loaded_model(sampler: Sampler) -> None:
    swap = wrapper_swap(BLOCKS, use_non_blocking=True, prefetch_blocks=1, block_swap_debug=True)
    swapped = sampler.sample("plain", set_swap=swap)
    assert torch.equal(swapped.latent, sampler.reference("plain"))
    assert "Swapping 29 transformer blocks" in swapped.log


def test_vace_conditioning_and_blocks_move_the_latent(sampler: Sampler) -> None:
    assert far(sampler.sample("vace", vace=False).latent, sampler.reference("vace"))


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_quantized_models_give_about_the_same_latent_each_time_that_they_are_loaded(
    sampler: Sampler, kind: str
) -> None:
    plain, quantized = sampler.reference("plain"), sampler.reference(kind)
    assert not torch.equal(quantized, plain)
    assert torch.nn.functional.cosine_similarity(quantized.flatten(), plain.flatten(), 0) > 0.9
    first = sampler.sample(kind, probe=True)
    assert torch.equal(first.latent, quantized)
    assert first.report["patched_linear"]
    assert first.report["linear"]["CustomLinear"] >= 10 * BLOCKS
    # the next run finds no weights in these layers and loads them again
    if kind == "fp8":
        assert all(place.startswith("meta") for place in first.report["block_bytes"])
    assert torch.equal(sampler.sample(kind).latent, quantized)


def test_loras_merged_unmerged_and_set_afterwards_agree(sampler: Sampler) -> None:
    loras = [(sampler.models["lora"], 0.7)]
    merged = sampler.reference("plain", loras=loras)
    unmerged = sampler.reference("plain", loras=loras, merge_loras=False)
    later = sampler.reference("plain", loras=loras, merge_loras=False, set_loras=True)
    assert far(merged, sampler.reference("plain"))
    torch.testing.assert_close(unmerged, merged, rtol=1e-2, atol=1e-2)
    assert torch.equal(later, unmerged)


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_unmerged_loras_on_quantized_models(sampler: Sampler, kind: str) -> None:
    scene: dict[str, Any] = {"loras": [(sampler.models["lora"], 1.0)], "merge_loras": False}
    swapped = sampler.sample(kind, **scene, swap=wrapper_swap(20), probe=True)
    assert far(swapped.latent, sampler.reference(kind))
    assert torch.equal(swapped.latent, sampler.reference(kind, **scene))
    assert swapped.report["lora_buffers"] == 0


def test_two_experts_share_the_steps(sampler: Sampler) -> None:
    both = sampler.reference("plain", low_noise_model="low", steps=4)
    assert both.isfinite().all()
    assert all(far(both, sampler.sample(kind, steps=4).latent) for kind in ("plain", "low"))
    again = sampler.sample("plain", low_noise_model="low", steps=4, swap=wrapper_swap(20))
    assert torch.equal(again.latent, both)


def test_an_exception_in_a_block_is_told_and_the_next_prompt_runs(sampler: Sampler) -> None:
    with pytest.raises(PromptFailed, match="block 3 raises at call 2"):
        sampler.sample("plain", between=[in_wan_block(3, raise_at=2)])
    assert torch.equal(sampler.sample("plain").latent, sampler.reference("plain"))


def test_a_prompt_can_be_interrupted_between_blocks(sampler: Sampler) -> None:
    server = sampler.server
    start = len(server.log_text())
    prompt_id = server.queue(sampler.prompt("plain", between=[in_wan_block(0, sleep_seconds=0.5)], steps=20))
    server.wait_log("TestWanVideoInBlock: call 1", start=start)
    server.interrupt()
    entry = server.wait(prompt_id, check=False)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    quiet = sampler.sample("plain", between=[in_wan_block(0)])
    assert torch.equal(quiet.latent, sampler.reference("plain"))
