"""What the live panel tells of models on two cards: each card's own figures, whichever is ComfyUI's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from intelligent_vram.cli.wan import WAN_14B, random_model, sample_inputs
from intelligent_vram.vram import SwapConfig, attach, live, snapshot
from intelligent_vram.vram.swap import Swap
from intelligent_vram.vram.units import GIB, MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
CONFIG = replace(WAN_14B, num_layers=4)
LIMITS = {"cuda:0": int(2.0 * GIB), "cuda:1": int(2.4 * GIB)}  # the blocks have 2.6 GiB
CLOSE = 64 * MIB  # other programs may take and give back a little between two looks


def streamed(device: str, node: str) -> tuple[Swap, tuple[torch.Tensor, ...]]:
    """A model that streams to a card, and what to call it with."""
    outside = snapshot(device).outside_torch
    model = random_model(CONFIG, torch.bfloat16)
    swap = attach(model, SwapConfig(mode="adaptive", max_vram=LIMITS[device] + outside), device)
    live.watch(swap, node)
    return swap, sample_inputs(CONFIG, 1024, torch.bfloat16, device, seed=1)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Memory is read anew, not taken from what the test before saw."""
    live._memory.clear()
    with torch.inference_mode():
        yield
    live._memory.clear()


def assert_shows(told: dict[str, Any], device: str, swap: Swap, node: str) -> None:
    """What is told of a device is the driver's and torch's word on that card, and this swap alone is on it."""
    card = torch.device(device)
    free, total = torch.cuda.mem_get_info(card)
    assert told["device"] == device
    assert told["name"] == f"{torch.cuda.get_device_name(card)} ({device})"
    assert not told["host"]
    assert told["total"] == total
    assert told["free"] == pytest.approx(free, abs=CLOSE)
    assert told["limit"] == swap.limit
    parts = [told[part] for part in ("resident", "slots", "beside", "rest", "others", "free")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(total, abs=CLOSE)
    assert sum(parts[:4]) == pytest.approx(torch.cuda.memory_reserved(card) + snapshot(card).outside_torch, abs=CLOSE)
    (model,) = told["models"]
    assert model["node"] == node
    assert model["forwards"] == 3
    assert model["figures"]["streamed"] == swap.telemetry.records(wait=True)[-1].streamed_bytes > 0
    assert model["figures"]["limit"] == swap.limit


@pytest.mark.usefixtures("fresh")
def test_a_model_on_the_second_card_is_shown_with_that_cards_figures() -> None:
    torch.cuda.set_device(0)
    swap, inputs = streamed("cuda:1", "1")
    try:
        for _ in range(3):
            swap.root(*inputs)
        torch.cuda.synchronize(1)
        (told,) = live.state("cuda:0")["devices"]
        assert_shows(told, "cuda:1", swap, "1")
        live.finished(swap, "prompt")
        assert live.state("cuda:0")["runs"][0]["device"] == "cuda:1"
    finally:
        swap.detach()
    (told,) = live.state("cuda:0")["devices"]
    assert (told["device"], told["models"]) == ("cuda:0", [])


@pytest.mark.usefixtures("fresh")
def test_models_on_two_cards_are_shown_each_with_its_own() -> None:
    pairs = {device: streamed(device, node) for device, node in (("cuda:0", "1"), ("cuda:1", "2"))}
    try:
        for _ in range(3):
            for swap, inputs in pairs.values():
                swap.root(*inputs)
        for device in pairs:
            torch.cuda.synchronize(device)
        told = live.state("cuda:0")
        for shown, node in zip(told["devices"], ("1", "2"), strict=True):
            assert_shows(shown, shown["device"], pairs[shown["device"]][0], node)
        assert told["ram"]["packed"] == sum(swap.packed.host_bytes for swap, _ in pairs.values())
    finally:
        for swap, _ in pairs.values():
            swap.detach()
