"""The engine and its plan on a second card, and on a card that another program has filled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from intelligent_vram.cli.wan import WAN_14B, random_model, sample_inputs
from intelligent_vram.vram import LimitTooSmall, SwapConfig, attach, hardware, snapshot
from intelligent_vram.vram.advise import RESERVE, Wishes, advise
from intelligent_vram.vram.hosts.traits import COMFY
from intelligent_vram.vram.model_facts import facts_of_tensors
from intelligent_vram.vram.units import GIB, MIB

from .conftest import ON_A_CARD

pytestmark = ON_A_CARD
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
CONFIG = replace(WAN_14B, num_layers=3)
HOLD = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_program(nbytes: int, card: int = 0) -> Iterator[None]:
    """Another process holds ``nbytes`` of a card."""
    uuid = f"GPU-{torch.cuda.get_device_properties(card).uuid}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": uuid},
    ) as process:
        assert process.stdout.readline().strip() == "held"
        try:
            yield
        finally:
            process.stdin.close()


def left_by(free: int, card: int = 0) -> int:
    """Bytes to hold so that ``free`` are left beside the other program's own CUDA context."""
    torch.cuda.empty_cache()
    return snapshot(torch.device("cuda", card)).device_free - free - 600 * MIB


@TWO
@pytest.mark.parametrize("mode", ["adaptive", "chunkwise", "layerwise"])
def test_a_model_streams_on_the_second_card_and_the_first_is_left_alone(mode: str) -> None:
    with torch.inference_mode():
        inputs = sample_inputs(CONFIG, 1024, torch.bfloat16, "cuda:1", seed=1)
        resident = random_model(CONFIG, torch.bfloat16).to("cuda:1")
        expected = resident(*inputs)
        del resident
        torch.cuda.empty_cache()
        first = torch.cuda.memory_reserved(0)
        outside = snapshot(torch.device("cuda", 1)).outside_torch
        model, limit = random_model(CONFIG, torch.bfloat16), int(1.8 * GIB) + outside
        assert torch.cuda.current_device() == 0
        swap = attach(model, SwapConfig(mode=mode, max_vram=limit), "cuda:1")
        torch.cuda.reset_peak_memory_stats(1)
        for _ in range(4):
            assert torch.equal(model(*inputs), expected)
        assert swap.plan.streamed
        assert torch.cuda.max_memory_reserved(1) + outside <= limit
        swap.detach()
        assert torch.cuda.memory_reserved(0) == first


@TWO
def test_each_card_is_planned_for_with_its_own_memory() -> None:
    facts = facts_of_tensors(random_model(CONFIG, torch.bfloat16).state_dict(), "small Wan")
    with other_program(left_by(2 * GIB, card=1), card=1):
        roomy, full = (hardware.measure(f"cuda:{index}") for index in (0, 1))
        assert full.others > roomy.others + full.device_total // 2
        assert not advise(facts, roomy, Wishes(), 1024, COMFY).prediction.plan.streamed
        with pytest.raises(LimitTooSmall):
            advise(facts, full, Wishes(), 1024, COMFY)


def test_a_card_full_of_other_programs_is_planned_for_with_what_is_left() -> None:
    facts = facts_of_tensors(random_model(CONFIG, torch.bfloat16).state_dict(), "small Wan")
    reserve = int(RESERVE * snapshot(torch.device("cuda", 0)).device_total)
    with other_program(left_by(reserve + 2 * GIB)):
        card = hardware.measure("cuda:0")
        advice = advise(facts, card, Wishes(), 1024, COMFY)
        assert advice.prediction.plan.streamed
        assert advice.config.max_vram <= card.reachable + card.outside_torch - reserve


def test_a_threshold_that_cannot_be_met_says_what_would_be_needed() -> None:
    facts = facts_of_tensors(random_model(CONFIG, torch.bfloat16).state_dict(), "small Wan")
    with other_program(left_by(GIB)):
        with pytest.raises(LimitTooSmall, match="are needed") as refused:
            advise(facts, hardware.measure("cuda:0"), Wishes(), 32760, COMFY)
        assert refused.value.needed > GIB
