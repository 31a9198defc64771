"""ComfyUI without a node of this pack: what the other host tests compare with is finite, repeatable and sensitive."""

import pytest
import torch

from .checkpoints import HUNYUAN_POOLED_DIM
from .comfy import ComfyServer, PromptFailed, cached_nodes
from .workflows import in_block, lora, probed, saved_latent, text_to_video

pytestmark = pytest.mark.host


def fresh_latent(server: ComfyServer, *args: object, **kwargs: object) -> torch.Tensor:
    """The latent of a prompt for which nothing was cached and no model was loaded."""
    server.free()
    entry = server.run(text_to_video(*args, **kwargs))
    assert not cached_nodes(entry)
    return saved_latent(entry)


def test_the_same_seed_gives_the_same_latent_and_another_seed_another(comfy_server: ComfyServer, wan: str) -> None:
    first = fresh_latent(comfy_server, wan, seed=1)
    again = fresh_latent(comfy_server, wan, seed=1)
    other = fresh_latent(comfy_server, wan, seed=2)
    assert first.shape == (1, 16, 2, 8, 8)
    assert first.isfinite().all()
    assert other.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=0.1, atol=0.1)


def test_guidance_changes_the_latent(comfy_server: ComfyServer, wan: str) -> None:
    guided = fresh_latent(comfy_server, wan, cfg=4.0)
    assert guided.isfinite().all()
    assert not torch.allclose(guided, fresh_latent(comfy_server, wan), rtol=0.1, atol=0.1)


def test_a_lora_changes_the_latent_and_comfyui_knows_all_its_layers(
    comfy_server: ComfyServer, wan: str, wan_lora: str
) -> None:
    changed = fresh_latent(comfy_server, wan, between=[lora(wan_lora)])
    assert changed.isfinite().all()
    assert not torch.allclose(changed, fresh_latent(comfy_server, wan), rtol=0.01, atol=0.01)
    assert torch.equal(fresh_latent(comfy_server, wan, between=[lora(wan_lora, 0.0)]), fresh_latent(comfy_server, wan))
    assert "lora key not loaded" not in comfy_server.log_text()


def test_models_with_two_kinds_of_blocks_sample_too(comfy_server: ComfyServer, hunyuan: str, wan_vace: str) -> None:
    assert fresh_latent(comfy_server, hunyuan, pooled_dim=HUNYUAN_POOLED_DIM).isfinite().all()
    assert fresh_latent(comfy_server, wan_vace).isfinite().all()


def test_comfyui_finds_every_weight_of_the_tiny_models_and_no_other(
    comfy_server: ComfyServer, wan: str, hunyuan: str, wan_vace: str
) -> None:
    start = len(comfy_server.log_text())
    for name, pooled_dim in ((wan, 0), (hunyuan, HUNYUAN_POOLED_DIM), (wan_vace, 0)):
        comfy_server.free()
        comfy_server.run(text_to_video(name, steps=1, pooled_dim=pooled_dim))
    log = comfy_server.log_text()[start:].lower()
    assert "unet missing" not in log
    assert "unet unexpected" not in log
    assert "left over keys" not in log


def test_a_probe_tells_what_the_host_made_of_the_model(comfy_server: ComfyServer, wan: str) -> None:
    report = probed(comfy_server.run(text_to_video(wan, probe=True)))
    assert report["patcher"].startswith("ModelPatcher")
    assert report["loaded_size"] > 0
    # on a GPU it counts other buffers too
    assert comfy_server.host.cuda or report["model_size"] >= report["loaded_size"]
    assert report["forward_overrides"] == 0
    assert report["hooks"] == 0
    assert report["rss"] > sum(report["parameter_bytes"].values()) > 0


def test_an_exception_in_a_block_is_told_and_the_next_prompt_runs(comfy_server: ComfyServer, wan: str) -> None:
    expected = fresh_latent(comfy_server, wan)
    with pytest.raises(PromptFailed, match="double_block 3 raises at call 2"):
        comfy_server.run(text_to_video(wan, between=[in_block(3, raise_at=2)]))
    assert torch.equal(saved_latent(comfy_server.run(text_to_video(wan))), expected)


def test_a_prompt_can_be_interrupted_while_it_samples(comfy_server: ComfyServer, wan: str) -> None:
    start = len(comfy_server.log_text())
    prompt_id = comfy_server.queue(text_to_video(wan, steps=20, between=[in_block(0, sleep_seconds=0.5)]))
    comfy_server.wait_log("TestRaiseInBlock: call 1", start=start)
    comfy_server.interrupt()
    entry = comfy_server.wait(prompt_id, check=False)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"


def test_a_prompt_with_an_unknown_model_is_rejected(comfy_server: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match=r"missing\.safetensors"):
        comfy_server.run(text_to_video("missing.safetensors"))
