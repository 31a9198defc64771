"""ComfyUI's own Save Model behind block swap: the file is the one that it writes without, LoRAs merged, encoded or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

from .comfy import ComfyServer
from .test_block_swap import latent
from .test_block_swap import swap as comfy_swap
from .workflows import Patch, lora, text_to_video

pytestmark = pytest.mark.host


def swap(lossless: str) -> Patch:
    kind, inputs = comfy_swap("chunkwise")
    return kind, {**inputs, "lossless": lossless}


def saved(server: ComfyServer, name: str, between: Sequence[Patch]) -> dict[str, torch.Tensor]:
    """What Save Model writes of the model behind the nodes ``between``."""
    prompt: dict[str, Any] = text_to_video(name, between=between)
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
    plain, merged = saved(comfy_server, wan, []), saved(comfy_server, wan, [lora(wan_lora)])
    assert not same(plain, merged)
    comfy_server.free()
    between = [lora(wan_lora), swap(lossless)]
    expected = latent(comfy_server, wan, between=between)
    assert same(saved(comfy_server, wan, between), merged)
    assert torch.equal(latent(comfy_server, wan, between=between), expected)
    # the model of the loader, whose weights block swap has just used
    assert same(saved(comfy_server, wan, []), plain)
    assert torch.equal(latent(comfy_server, wan, between=between), expected)
    comfy_server.free()
