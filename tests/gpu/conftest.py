"""What the tests of the engine on a real GPU share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from intelligent_vram.cli.wan import WAN_14B, WanConfig, WanModel, meta_model, random_model, sample_inputs
from intelligent_vram.vram import snapshot
from intelligent_vram.vram.codec import NoCodec, codec_for

MODES = ("adaptive", "chunkwise", "layerwise")
CONFIG: WanConfig = replace(WAN_14B, num_layers=3)
TOKENS = (1024, 7800)


def no_card() -> str | None:
    """Why there is nothing to test, in words."""
    return None if torch.cuda.is_available() else "there is no CUDA device"


def no_codec() -> str | None:
    """Why lossless coding cannot be tested, in words."""
    if no_card():
        return no_card()
    try:
        codec_for(torch.device("cuda"))
    except NoCodec as reason:
        return str(reason)
    return None


ON_A_CARD = [pytest.mark.gpu, pytest.mark.skipif(no_card() is not None, reason=str(no_card()))]
WITH_CODEC = [pytest.mark.gpu, pytest.mark.skipif(no_codec() is not None, reason=str(no_codec()))]
AS_SAMPLERS = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference() -> Iterator[None]:
    """As samplers run models; what a test leaves on the GPU is given back."""
    with torch.inference_mode():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def inputs() -> dict[int, tuple[torch.Tensor, ...]]:
    with torch.inference_mode():
        return {tokens: sample_inputs(CONFIG, tokens, torch.bfloat16, "cuda", seed=1) for tokens in TOKENS}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_model(CONFIG, torch.bfloat16, "cuda").cpu().state_dict()


def model_of(weights: dict[str, torch.Tensor]) -> WanModel:
    """A model with weights of its own, in host memory."""
    model = meta_model(CONFIG)
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return model


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> WanModel:
    return model_of(weights)


@pytest.fixture(scope="module")
def expected(inputs: dict, weights: dict) -> dict[int, torch.Tensor]:
    """Outputs of the model with all weights on the GPU."""
    with torch.inference_mode():
        resident = model_of(weights).cuda()
        return {tokens: resident(*args) for tokens, args in inputs.items()}


def outside() -> int:
    """What this process holds on the GPU outside torch: part of every limit."""
    torch.cuda.empty_cache()
    return snapshot(torch.device("cuda", 0)).outside_torch
