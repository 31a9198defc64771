"""Streaming from another card's memory. Needs two GPUs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from intelligent_vram.cli.wan import WAN_14B, WanConfig, random_model, sample_inputs
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.offload import LEAVE_FREE
from intelligent_vram.vram.units import GIB, MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

CONFIG: WanConfig = replace(WAN_14B, num_layers=3)
TOKENS = 1024
BOTH = [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As samplers run models."""
    with torch.inference_mode():
        yield
    gc.collect()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            torch.cuda.empty_cache()


def expected(device: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs, and what the model makes of them with all weights on the card."""
    inputs = sample_inputs(CONFIG, TOKENS, torch.bfloat16, device, seed=1)
    model = random_model(CONFIG, torch.bfloat16).to(device)
    return inputs, model(*inputs)


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise", "layerwise"])
@pytest.mark.parametrize(("compute", "other"), BOTH)
def test_outputs_are_the_same_to_the_bit_and_the_other_card_is_given_back(compute: str, other: str, mode: str) -> None:
    inputs, wanted = expected(compute)
    model = random_model(CONFIG, torch.bfloat16)
    before = torch.cuda.memory_allocated(other)
    limit = round(2.4 * GIB) + torch.cuda.memory_allocated(compute)
    swap = attach(model, SwapConfig(mode=mode, max_vram=limit, offload_device=other), compute)
    assert torch.cuda.memory_allocated(other) - before >= swap.packed.packed_bytes == swap.packed.away_bytes
    assert torch.cuda.memory_allocated(other) - before < swap.packed.packed_bytes + 64 * MIB
    assert swap.packed.host_bytes == swap.packed.arena.page_locked_bytes == 0
    for _ in range(6):
        assert torch.equal(model(*inputs), wanted)
    record = swap.telemetry.last(wait=True)
    assert record.streamed_bytes > 0
    swap.detach()
    assert torch.cuda.memory_allocated(other) == before
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert torch.equal(model.to(compute)(*inputs), wanted)


@pytest.mark.parametrize(("compute", "other"), BOTH)
def test_compute_on_the_other_card_meanwhile_changes_nothing(compute: str, other: str) -> None:
    """Another model may compute on the card that weights stream from."""
    inputs, wanted = expected(compute)
    model = random_model(CONFIG, torch.bfloat16)
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=3, offload_device=other), compute)
    a = torch.randn(4096, 4096, device=other, dtype=torch.bfloat16)
    for _ in range(6):
        for _ in range(30):
            a = torch.tanh(a @ a)
        assert torch.equal(model(*inputs), wanted)
    swap.detach()


def test_a_card_with_too_little_room_takes_what_fits_and_keeps_512_mib(caplog: pytest.LogCaptureFixture) -> None:
    inputs, wanted = expected("cuda:0")
    model = random_model(CONFIG, torch.bfloat16)
    free, _ = torch.cuda.mem_get_info("cuda:1")
    filler = torch.empty(free - LEAVE_FREE - GIB, dtype=torch.uint8, device="cuda:1")
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=3, offload_device="cuda:1"), "cuda:0")
    assert 0 < swap.packed.away_bytes <= GIB
    assert swap.packed.away_bytes + swap.packed.host_bytes == swap.packed.packed_bytes
    assert torch.cuda.mem_get_info("cuda:1")[0] >= LEAVE_FREE - 64 * MIB
    assert len([line for line in caplog.messages if "has no room for the other" in line]) == 1
    for _ in range(4):
        assert torch.equal(model(*inputs), wanted)
    swap.detach()
    del filler


def test_the_card_that_computes_and_one_that_is_not_there_are_refused_before_anything_moves() -> None:
    model = random_model(CONFIG, torch.bfloat16)
    before = {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()}
    for name, words in (("cuda:0", "the card that the model computes on"), ("cuda:63", "no such card here")):
        with pytest.raises(ValueError, match=words):
            attach(model, SwapConfig(offload_device=name), "cuda:0")
    assert {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()} == before
