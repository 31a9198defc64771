"""The engine on a real GPU: bit-exact in every mode, never over the limit, whole afterwards."""

from __future__ import annotations

import time

import pytest
import torch
from intelligent_vram.cli.wan import WanModel, sample_inputs
from intelligent_vram.vram import LimitTooSmall, SwapConfig, attach, snapshot
from intelligent_vram.vram.contiguity import Guard, find
from intelligent_vram.vram.units import GIB, MIB

from .conftest import AS_SAMPLERS, CONFIG, MODES, ON_A_CARD, TOKENS, model_of, outside

pytestmark = [*ON_A_CARD, AS_SAMPLERS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit_gib", [1.7, 2.4, 3.2, None])
def test_outputs_are_the_same_to_the_bit_and_the_limit_holds(
    mode: str, limit_gib: float | None, model: WanModel, inputs: dict, expected: dict
) -> None:
    limit = None if limit_gib is None else round(limit_gib * GIB) + outside()
    before = torch.cuda.memory_allocated()
    swap = attach(model, SwapConfig(mode=mode, max_vram=limit), "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for tokens in TOKENS:
            for _ in range(3):
                assert torch.equal(model(*inputs[tokens]), expected[tokens])
                if limit is not None:
                    assert torch.cuda.max_memory_reserved() + outside() <= limit
    swap.detach()
    assert torch.cuda.memory_allocated() - before < 64 * MIB
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(model.cuda()(*inputs[1024]), expected[1024])


@pytest.mark.parametrize("mode", MODES)
def test_forwards_that_are_not_waited_for_come_out_right(
    mode: str, model: WanModel, inputs: dict, expected: dict
) -> None:
    swap = attach(model, SwapConfig(mode=mode, max_vram=round(2.2 * GIB) + outside()), "cuda")
    outputs = [model(*inputs[1024]) for _ in range(12)]
    assert all(torch.equal(output, expected[1024]) for output in outputs)
    swap.detach()


def test_weights_that_are_not_page_locked_stream_through_the_staging_ring(
    model: WanModel, inputs: dict, expected: dict
) -> None:
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=3, host_budget=0), "cuda")
    assert swap.packed.arena.page_locked_bytes == 0
    for _ in range(3):
        assert torch.equal(model(*inputs[1024]), expected[1024])
    swap.detach()
    assert torch.equal(model.cuda()(*inputs[1024]), expected[1024])


def test_a_forward_on_another_stream_is_right(model: WanModel, inputs: dict, expected: dict) -> None:
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=3), "cuda")
    side = torch.cuda.Stream()
    for turn in range(4):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
            output = model(*inputs[1024])
        torch.cuda.synchronize()
        assert torch.equal(output, expected[1024])
    swap.detach()


def test_more_tokens_than_measured_do_not_break_the_limit(model: WanModel, inputs: dict, expected: dict) -> None:
    limit = round(2.0 * GIB) + outside()
    swap = attach(model, SwapConfig(max_vram=limit), "cuda")
    torch.cuda.reset_peak_memory_stats()
    for tokens in (1024, 1024, 1024, 7800, 7800, 7800, 1024):
        assert torch.equal(model(*inputs[tokens]), expected[tokens])
    assert torch.cuda.max_memory_reserved() + outside() <= limit
    swap.detach()


def test_a_limit_that_cannot_hold_the_weights_is_refused_with_one_that_can(
    model: WanModel, inputs: dict, expected: dict
) -> None:
    with pytest.raises(LimitTooSmall, match="smallest limit") as refused:
        attach(model, SwapConfig(max_vram=outside() + 600 * MIB), "cuda")
    assert all(p.device.type == "cpu" for p in model.parameters())
    swap = attach(model, SwapConfig(max_vram=refused.value.needed + 300 * MIB), "cuda")
    assert torch.equal(model(*inputs[1024]), expected[1024])
    swap.detach()


def activations(model: WanModel, args: tuple) -> int:
    """Bytes that a forward with all weights on the GPU takes beside them: attention's kernels take more or less, and which one
    torch calls depends on what ran before in this process."""
    model.cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(*args)
    return torch.cuda.max_memory_allocated() - before


def test_running_out_of_memory_says_what_to_do_and_leaves_the_model_whole(
    model: WanModel, weights: dict, inputs: dict, expected: dict
) -> None:
    # of a size of its own: cuDNN takes another algorithm for a size that it once had no memory for
    large = sample_inputs(CONFIG, 12288, torch.bfloat16, "cuda", seed=1)
    few = activations(model_of(weights), inputs[1024])
    with pytest.raises(LimitTooSmall) as refused:
        attach(model, SwapConfig(mode="layerwise", max_vram=outside() + 64 * MIB), "cuda")
    swap = attach(model, SwapConfig(mode="layerwise", max_vram=refused.value.needed + few + 100 * MIB), "cuda")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="max_vram_gb"):
            model(*large)
    torch.cuda.empty_cache()
    assert torch.equal(model(*inputs[1024]), expected[1024])
    swap.detach()
    assert torch.equal(model.cuda()(*inputs[7800]), expected[7800])


def test_the_host_gets_memory_back_at_once_when_it_asks(model: WanModel, inputs: dict, expected: dict) -> None:
    swap = attach(model, SwapConfig(), "cuda")
    for _ in range(3):
        assert torch.equal(model(*inputs[1024]), expected[1024])
    free = torch.cuda.mem_get_info()[0]
    assert swap.evict(600 * MIB) >= 600 * MIB
    assert torch.cuda.mem_get_info()[0] - free >= 590 * MIB - 2 * 270 * MIB
    for _ in range(3):
        assert torch.equal(model(*inputs[1024]), expected[1024])
    swap.detach()


def compile_layers(model: WanModel) -> None:
    for block in model.blocks:
        block.cross_attn.compile(dynamic=False)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_stream(mode: str, model: WanModel, weights: dict, inputs: dict) -> None:
    """The compiler fuses across layers where nothing is streamed and not where something is: close, and repeatable."""
    resident = model_of(weights).cuda()
    compile_layers(resident)
    expected = resident(*inputs[1024])
    del resident
    swap = attach(model, SwapConfig(mode=mode, max_vram=round(2.4 * GIB) + outside()), "cuda")
    compile_layers(model)
    outputs = [model(*inputs[1024]) for _ in range(4)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert (outputs[0] - expected).abs().max() < 0.02 * expected.abs().max()
    swap.detach()


def test_fp8_weights_stream(inputs: dict) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(2048, 2048).to(torch.float8_e4m3fn)
            self.weight = torch.nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
            self.register_buffer("scale", torch.tensor(0.02))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            quantized = x.to(torch.float8_e4m3fn)
            one = torch.ones((), device=x.device)
            return torch._scaled_mm(quantized, self.weight, one, self.scale, out_dtype=torch.bfloat16)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Scaled() for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    for block in model.blocks:
        assert block.weight.stride() == (1, 2048)
    swap = attach(model, SwapConfig(mode="chunkwise", block_size=5 * MIB, streamed_blocks=6), "cuda")
    streamed = [model(x) for _ in range(3)]
    swap.detach()
    assert all(torch.equal(output, model.cuda()(x)) for output in streamed)


def test_the_guard_mends_what_arrives_misaligned_on_the_gpu() -> None:
    block = torch.nn.Linear(64, 64, bias=False)
    storage = torch.randn(64 * 64 + 1, device="cuda")
    guard = Guard()
    guard.add(block)
    block._parameters["weight"] = torch.nn.Parameter(storage[1:].view(64, 64), requires_grad=False)
    assert find(block)
    block.to("cuda")
    assert guard.mended == 1
    assert not find(block)
    assert torch.equal(block.weight, storage[1:].view(64, 64))
    guard.remove()
    assert "_apply" not in block.__dict__


def test_nothing_is_left_after_many_attachments(model: WanModel, inputs: dict) -> None:
    before = None
    for turn in range(6):
        swap = attach(model, SwapConfig(mode=MODES[turn % 3], max_vram=round(2.4 * GIB) + outside()), "cuda")
        model(*inputs[1024])
        swap.detach()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        now = snapshot("cuda")
        if turn == 2:
            before = now
    assert now.allocated == before.allocated
    assert now.process_rss - before.process_rss < 200 * MIB


def test_set_up_is_timed_and_copies_are_seen(model: WanModel, inputs: dict) -> None:
    started = time.perf_counter()
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=3), "cuda")
    assert swap.setup_seconds <= time.perf_counter() - started
    for _ in range(3):
        model(*inputs[1024])
    record = swap.telemetry.last(wait=True)
    assert record.misses == 0
    assert record.streamed_bytes == swap.plan.streamed_bytes
    assert 0 < record.stall < record.seconds
    assert all(copy.end > copy.start for copy in record.copies)
    swap.detach()
