"""ComfyUI-WanVideoWrapper without a node of this pack: it samples tiny models of each kind, the same each time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import write_lora
from .comfy import ComfyServer, Host, PromptFailed
from .wanvideo import BLOCKS, HELPERS, find_wrapper, in_wan_block, sample_video, wrapper_swap, write_checkpoint
from .workflows import probed, saved_latent

pytestmark = pytest.mark.host

LORA_LAYERS = ("blocks.1.self_attn.q", "blocks.14.cross_attn.v", "blocks.29.ffn.2")


@pytest.fixture(scope="session")
def wrapper(comfy_host: Host) -> Path:
    """The WanVideoWrapper of this machine."""
    found = find_wrapper(comfy_host)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def wan_server(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One running ComfyUI with the wrapper, in which this pack's nodes act on a CPU too."""
    base = tmp_path_factory.mktemp("wanvideo")
    with ComfyServer(comfy_host, base, env={"INTELLIGENT_VRAM_FORCE": "1"}, packs=[wrapper, HELPERS]) as server:
        try:
            server.object_info("WanVideoSampler")
        except KeyError:
            reason = [line for line in server.log_text().splitlines() if "Cannot import" in line or "No module" in line]
            pytest.skip(f"ComfyUI does not load {wrapper.name}: {reason[0] if reason else 'see its log'}")
        yield server


@pytest.fixture(scope="session")
def models(wan_server: ComfyServer) -> dict[str, str]:
    """File names of tiny models by kind: plain, low (other weights), fp8 (scaled), vace, gguf; and of a LoRA for them."""
    folder = wan_server.models / "diffusion_models"
    plain = write_checkpoint(folder / "tiny_plain.safetensors")
    lora = write_lora(wan_server.models / "loras" / "tiny_lora.safetensors", plain, LORA_LAYERS)
    return {
        "plain": plain.name,
        "low": write_checkpoint(folder / "tiny_other.safetensors", seed=1).name,
        "fp8": write_checkpoint(folder / "tiny_fp8.safetensors", scaled_fp8=True).name,
        "vace": write_checkpoint(folder / "tiny_vace.safetensors", vace=True).name,
        "gguf": write_checkpoint(folder / "tiny_q8.gguf").name,
        "lora": lora.name,
    }


@pytest.fixture(scope="session")
def expected(wan_server: ComfyServer, models: dict[str, str]) -> dict[str, torch.Tensor]:
    """The latent of each kind of model with nothing in between, seed 0."""
    return {kind: latent(wan_server, name, vace=kind == "vace") for kind, name in models.items() if kind != "lora"}


def latent(server: ComfyServer, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The latent of one prompt."""
    return saved_latent(server.run(sample_video(*args, **kwargs)))


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two latents differ by more than rounding."""
    return not torch.allclose(one, other, rtol=0.01, atol=0.01)


def test_the_same_seed_gives_the_same_latent_and_another_seed_another(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    plain = expected["plain"]
    wan_server.free()
    assert plain.shape == (1, 16, 2, 8, 8)
    assert all(one.isfinite().all() for one in expected.values())
    assert torch.equal(latent(wan_server, models["plain"]), plain)
    assert far(latent(wan_server, models["plain"], seed=1), plain)
    assert far(latent(wan_server, models["plain"], cfg=4.0), plain)


@pytest.mark.parametrize("kind", ["plain", "vace", "fp8", "gguf"])
def test_the_wrappers_own_block_swap_changes_nothing(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor], kind: str
) -> None:
    swap = wrapper_swap(20, vace_blocks_to_swap=8)
    assert torch.equal(latent(wan_server, models[kind], swap=swap, vace=kind == "vace"), expected[kind])


def test_block_swap_can_be_set_on_a_loaded_model(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    swap = wrapper_swap(BLOCKS, use_non_blocking=True, prefetch_blocks=1, block_swap_debug=True)
    start = len(wan_server.log_text())
    assert torch.equal(latent(wan_server, models["plain"], set_swap=swap), expected["plain"])
    assert "Swapping 29 transformer blocks" in wan_server.log_text()[start:]


def test_vace_conditioning_and_blocks_move_the_latent(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    assert far(latent(wan_server, models["vace"]), expected["vace"])


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_quantized_models_give_about_the_same_latent_each_time_that_they_are_loaded(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor], kind: str
) -> None:
    plain, quantized = expected["plain"], expected[kind]
    assert not torch.equal(quantized, plain)
    assert torch.nn.functional.cosine_similarity(quantized.flatten(), plain.flatten(), 0) > 0.9
    wan_server.free()
    entry = wan_server.run(sample_video(models[kind], probe=True))
    report = probed(entry)
    assert torch.equal(saved_latent(entry), quantized)
    assert report["patched_linear"]
    assert report["linear"]["CustomLinear"] >= 10 * BLOCKS
    # the next run finds no weights in these layers and loads them again
    if kind == "fp8":
        assert all(place.startswith("meta") for place in report["block_bytes"])
    entry = wan_server.run(sample_video(models[kind], seed=1))
    assert torch.equal(latent(wan_server, models[kind]), quantized)


def test_loras_merged_unmerged_and_set_afterwards_agree(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    loras = [(models["lora"], 0.7)]
    merged = latent(wan_server, models["plain"], loras=loras)
    unmerged = latent(wan_server, models["plain"], loras=loras, merge_loras=False)
    later = latent(wan_server, models["plain"], loras=loras, merge_loras=False, set_loras=True)
    assert far(merged, expected["plain"])
    torch.testing.assert_close(unmerged, merged, rtol=1e-2, atol=1e-2)
    assert torch.equal(later, unmerged)


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_unmerged_loras_on_quantized_models(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor], kind: str
) -> None:
    loras: dict[str, Any] = {"loras": [(models["lora"], 0.7)], "merge_loras": False}
    entry = wan_server.run(sample_video(models[kind], **loras, probe=True))
    assert far(saved_latent(entry), expected[kind])
    assert probed(entry)["lora_buffers"] == 0
    swapped = latent(wan_server, models[kind], **loras, swap=wrapper_swap(20))
    assert torch.equal(swapped, saved_latent(entry))


def test_two_experts_share_the_steps(wan_server: ComfyServer, models: dict[str, str]) -> None:
    both = latent(wan_server, models["plain"], low_noise_model=models["low"], steps=4)
    assert both.isfinite().all()
    assert all(far(both, latent(wan_server, models[name], steps=4)) for name in ("plain", "low"))
    again = latent(wan_server, models["plain"], low_noise_model=models["low"], steps=4, swap=wrapper_swap(20))
    assert torch.equal(again, both)


def test_an_exception_in_a_block_is_told_and_the_next_prompt_runs(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(PromptFailed, match="block 3 raises at call 2"):
        wan_server.run(sample_video(models["plain"], between=[in_wan_block(3, raise_at=2)]))
    assert torch.equal(latent(wan_server, models["plain"]), expected["plain"])


def test_a_prompt_can_be_interrupted_between_blocks(
    wan_server: ComfyServer, models: dict[str, str], expected: dict[str, torch.Tensor]
) -> None:
    start = len(wan_server.log_text())
    slow = sample_video(models["plain"], between=[in_wan_block(0, sleep_seconds=0.5)], steps=20)
    prompt_id = wan_server.queue(slow)
    wan_server.wait_log("TestWanVideoInBlock: call 1", start=start)
    wan_server.interrupt()
    entry = wan_server.wait(prompt_id, check=False)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    quiet = latent(wan_server, models["plain"], between=[in_wan_block(0)])
    assert torch.equal(quiet, expected["plain"])
