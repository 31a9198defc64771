"""ComfyUI's own Save Model and merging behind block swap: what comes of them is what does without, LoRAs merged, encoded or not."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

from .comfy import ComfyServer
from .test_block_swap import latent
from .test_block_swap import swap as comfy_swap
from .workflows import Patch, lora, probed, saved_latent, text_to_video

pytestmark = pytest.mark.host


def swap(lossless: str) -> Patch:
    return comfy_swap("chunkwise", lossless=lossless)


def saved(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What Save Model writes of the model that the prompt would sample."""
    last = prompt["sampler"]["inputs"]["model"]
    wanted = {node: prompt[node] for node in prompt if node == "model" or node.startswith("patch")}
    wanted["keep"] = {"class_type": "ModelSave", "inputs": {"model": last, "filename_prefix": f"kept/{uuid4()}/model"}}
    server.run(wanted)
    (file,) = Path(server.output, wanted["keep"]["inputs"]["filename_prefix"]).parent.iterdir()
    return load_file(file)


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@pytest.mark.parametrize("lossless", ["off", "on"])
def test_a_streamed_model_is_saved_as_it_is_without_streaming(
    comfy_server: ComfyServer, wan: str, wan_lora: str, lossless: str
) -> None:
    plain = saved(comfy_server, text_to_video(wan))
    merged = saved(comfy_server, text_to_video(wan, between=[lora(wan_lora)]))
    assert not same(plain, merged)
    comfy_server.free()
    between = [lora(wan_lora), swap(lossless)]
    expected = latent(comfy_server, wan, between=between)
    assert same(saved(comfy_server, text_to_video(wan, between=between)), merged)
    assert torch.equal(latent(comfy_server, wan, between=between), expected)
    # the model of the loader, whose weights block swap has just used
    assert same(saved(comfy_server, text_to_video(wan)), plain)
    assert torch.equal(latent(comfy_server, wan, between=between), expected)
    comfy_server.free()


@pytest.mark.parametrize("behind", [True, False])
def test_a_merge_reads_the_model_s_own_weights_while_it_is_streamed(
    comfy_server: ComfyServer, wan: str, wan_lora: str, behind: bool
) -> None:
    prompt = text_to_video(wan, between=[lora(wan_lora), swap("off")], seed=5, probe=True)
    prompt["probe"]["class_type"] = "TestMergeProbe"
    if not behind:
        prompt["probe"]["inputs"]["model"] = ["model", 0]
    report = probed(comfy_server.run(prompt))
    assert report["to_merge"] > 100
    assert report["not_its_own"] == 0
    comfy_server.free()


def test_a_merged_model_is_the_same_behind_block_swap(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    def merged(*behind: Patch) -> torch.Tensor:
        """Half of the model, half of the one with a LoRA, which has just been sampled."""
        other = [lora(wan_lora), *behind]
        latent(comfy_server, wan, between=other)
        prompt = text_to_video(wan, between=other)
        prompt["merge"] = {
            "class_type": "ModelMergeSimple",
            "inputs": {"model1": ["model", 0], "model2": prompt["sampler"]["inputs"]["model"], "ratio": 0.5},
        }
        last = "merge"
        for i, (class_type, inputs) in enumerate(behind):
            prompt[f"behind{i}"] = {"class_type": class_type, "inputs": {**inputs, "model": [last, 0]}}
            last = f"behind{i}"
        prompt["sampler"]["inputs"]["model"] = [last, 0]
        return saved_latent(comfy_server.run(prompt))

    expected = merged()
    comfy_server.free()
    assert torch.equal(merged(swap("off")), expected)
    assert torch.equal(merged(swap("on")), expected)
    comfy_server.free()
