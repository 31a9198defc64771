"""Weights are packed once, are in RAM once, and only what a patch changed is packed again."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intelligent_vram.vram import PackedModel, Patches, SwapConfig, attach
from intelligent_vram.vram.discover import take_apart
from intelligent_vram.vram.layout import Entry, flatten, plan_tensor
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.staging import BUFFER_BYTES, BUFFERS, Piece, StagingRing
from intelligent_vram.vram.stream import Streamer, StreamUnit
from intelligent_vram.vram.telemetry import Telemetry
from intelligent_vram.vram.units import MIB
from safetensors.torch import load_file, save_file
from torch import nn

from .models import CASES, WIDTH, build, contents, fingerprint, inputs, outputs, wanted_outputs
from .subclasses import QuantParameter, QuantTensor, Scaled

SMALL = 9000
CPU = torch.device("cpu")


def adding(**amounts):
    """Patches that add ``amounts`` to weights; the key is a path with ``__`` for the dots."""
    amounts = {name.replace("__", "."): amount for name, amount in amounts.items()}
    return Patches(amounts.get, lambda path, tensor: tensor + amounts[path])


def packed_model(model, segment_bytes=SMALL, budget=None):
    return PackedModel(CPU, take_apart(model).inside, segment_bytes, budget)


def packed_entries(packed):
    return [entry for layer in packed.layers for entry in layer.entries]


def streamed_weight(packed, path):
    """The packed bytes of one plain weight, as they would be streamed."""
    for number, layer in enumerate(packed.layers):
        for entry in layer.entries:
            if entry.entry.path == path:
                return entry.entry.bind(packed.source(number, number + 1))
    raise KeyError(path)


# -- once --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packing_writes_all_weights_once_and_nothing_the_second_time():
    model = build("blocks in a list")
    packed = packed_model(model)
    assert packed.pack() == packed.packed_bytes == packed.host_bytes
    assert packed.pack() == 0
    assert all(
        torch.equal(streamed_weight(packed, f"blocks.{path}"), weight)
        for path, weight in model.blocks.named_parameters()
    )


@pytest.mark.parametrize("mode", ["chunkwise", "layerwise"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_after_attaching_each_packed_weight_lives_in_the_arena_and_nowhere_else(name, mode):
    model = build(name)
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL), "cpu")
    arena = {segment.host.buffer.untyped_storage().data_ptr() for segment in swap.packed._segments}
    assert packed_entries(swap.packed)
    for entry in packed_entries(swap.packed):
        assert entry.entry.host.untyped_storage().data_ptr() in arena
    assert swap.packed.host_bytes == swap.packed.packed_bytes


@torch.no_grad()
def test_the_memory_that_weights_had_before_is_released():
    model = build("blocks in a list")
    before = {path: weakref.ref(weight.untyped_storage()) for path, weight in model.named_parameters()}
    packed = attach(model, SwapConfig(block_size=SMALL), "cpu").detach()
    gc.collect()
    assert packed_entries(packed)
    assert [entry.entry.path for entry in packed_entries(packed) if before[entry.entry.path]() is not None] == []


def test_packed_layers_of_real_size_take_at_most_two_percent_more():
    """A block of Wan 14B: width 5120, feed-forward 13824. Nothing is touched, so nothing is allocated."""
    model = nn.Module()
    block = nn.Module()
    for number, shape in enumerate([(5120, 5120)] * 8 + [(13824, 5120), (5120, 13824)]):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))
        layer.bias = nn.Parameter(torch.empty(shape[0], dtype=torch.bfloat16))
        block.add_module(str(number), layer)
    block.norm = nn.LayerNorm(5120, dtype=torch.bfloat16)
    block.modulation = nn.Parameter(torch.empty(1, 6, 5120, dtype=torch.bfloat16))
    model.blocks = nn.ModuleList([block])
    weights = sum(weight.nbytes for weight in model.parameters())
    for segment_bytes in (100 * MIB, 300 * MIB, 2000 * MIB):
        packed = packed_model(model, segment_bytes)
        assert weights <= packed.packed_bytes <= 1.02 * weights


def test_packed_layers_of_small_models_take_at_most_two_percent_more_too():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(320, 320) for _ in range(20))
    weights = sum(weight.nbytes for weight in model.parameters())
    assert weights <= packed_model(model, 1 * MIB).packed_bytes <= 1.02 * weights


@settings(max_examples=15)
@given(st.integers(20_000, 200_000))
def test_small_blocks_share_a_segment_and_no_segment_is_cut_through_a_layer(segment_bytes):
    packed = packed_model(build("two lists"), segment_bytes)
    used = {}
    for layer in packed.layers:
        assert layer.start == used.get(layer.segment, 0)
        used[layer.segment] = layer.start + layer.nbytes
    assert sum(used.values()) == packed.packed_bytes
    assert all(size <= segment_bytes for size in used.values())


@torch.no_grad()
def test_packing_that_broke_off_goes_on_where_it_was():
    model = build("blocks in a list")
    weights = contents(model)
    packed = packed_model(model)

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        packed.pack(progress=stop)
    assert all(torch.equal(value, weights[name]) for name, value in contents(model).items())
    already = packed.host_bytes
    assert packed.pack() == packed.packed_bytes - already
    assert packed.host_bytes == packed.packed_bytes
    assert all(torch.equal(value, weights[name]) for name, value in contents(model).items())


# -- patches -----------------------------------------------------------------------------------------------------------

QKV, OUT = "blocks.1.qkv.weight", "blocks.3.out.weight"
QKV_BYTES, OUT_BYTES = 3 * WIDTH * WIDTH * 4, WIDTH * WIDTH * 4


@torch.no_grad()
def test_only_touched_weights_are_packed_again():
    model = build("blocks in a list")
    weights = contents(model)
    packed = packed_model(model)
    packed.pack()
    assert packed.pack(adding(blocks__1__qkv__weight=1.0)) == QKV_BYTES
    assert torch.equal(streamed_weight(packed, QKV), weights[QKV] + 1)
    assert packed.pack(adding(blocks__1__qkv__weight=1.0)) == 0
    assert packed.pack(adding(blocks__1__qkv__weight=1.0, blocks__3__out__weight=2.0)) == OUT_BYTES
    assert packed.pack(adding(blocks__1__qkv__weight=3.0, blocks__3__out__weight=2.0)) == QKV_BYTES
    assert torch.equal(streamed_weight(packed, QKV), weights[QKV] + 3)
    assert torch.equal(streamed_weight(packed, OUT), weights[OUT] + 2)
    assert packed.pack() == QKV_BYTES + OUT_BYTES
    assert all(torch.equal(streamed_weight(packed, name), weights[name]) for name in (QKV, OUT))


@torch.no_grad()
def test_the_models_own_weights_never_see_a_patch():
    model = build("blocks in a list")
    weights = contents(model)
    packed = packed_model(model)
    for patches in (adding(blocks__1__qkv__weight=1.0), adding(blocks__3__out__weight=1.0), adding()):
        packed.pack(patches)
        assert all(torch.equal(value, weights[name]) for name, value in contents(model).items())


@torch.no_grad()
def test_a_patch_is_applied_once_each_time_it_changes():
    model, applied = build("blocks in a list"), []
    packed = packed_model(model)
    signatures = {QKV: 1}

    def apply(path, tensor):
        applied.append((path, signatures[path]))
        return tensor * 2

    patches = Patches(signatures.get, apply)
    packed.pack(patches)
    packed.pack(patches)
    signatures[QKV] = 2
    packed.pack(patches)
    signatures[OUT] = 1
    packed.pack(patches)
    assert applied == [(QKV, 1), (QKV, 2), (OUT, 1)]


@torch.no_grad()
def test_removing_a_patch_brings_every_bit_back_whenever_it_was_given():
    path = "blocks.2.odd"
    for given_first in (True, False):
        model = build("several dtypes")
        model.blocks[2].low.weight.view(torch.int16)[0, :3] = torch.tensor([-1, 0x7FC1, -0x8000])  # NaNs, minus zero
        weights = contents(model)
        packed = packed_model(model)
        patches = Patches(
            lambda name: "x" if name in (path, "blocks.2.low.weight") else None, lambda name, tensor: tensor * 3
        )
        if not given_first:
            packed.pack()
        packed.pack(patches)
        assert torch.equal(streamed_weight(packed, path), weights[path] * 3)
        packed.pack()
        for name in (path, "blocks.2.low.weight"):
            for tensor in (streamed_weight(packed, name), dict(model.named_parameters())[name]):
                assert torch.equal(tensor.view(torch.uint8), weights[name].view(torch.uint8))
        arena = {segment.host.buffer.untyped_storage().data_ptr() for segment in packed._segments}
        assert {entry.entry.host.untyped_storage().data_ptr() for entry in packed_entries(packed)} <= arena


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("block_size", "host_budget"), [(SMALL, None), (1 * MIB, 0)])
@torch.no_grad()
def test_patched_forwards_are_those_of_a_patched_model(host_budget, block_size, mode):
    x, config = inputs(), SwapConfig(mode=mode, block_size=block_size, host_budget=host_budget)
    model = build("a list between the blocks")
    plain, weights, before = model(x), contents(model), fingerprint(model)
    first = {"blocks.1.qkv.weight": 0.5, "vace_blocks.0.out.weight": 0.25, "embed.weight": 0.125, "head.bias": 1.0}
    second = {"blocks.1.qkv.weight": 0.75, "blocks.2.modulation": 0.5}

    def patched(amounts):
        other = build("a list between the blocks")
        for name, weight in other.named_parameters():
            weight.add_(amounts.get(name, 0))
        return other(x)

    packed = None
    for amounts in ({}, first, second, {}, second, first):
        patches = Patches(amounts.get, lambda path, tensor, amounts=amounts: tensor + amounts[path])
        swap = attach(model, config, "cpu", patches=patches, packed=packed)
        wanted = patched(amounts)
        for _ in range(2):
            assert torch.equal(model(x), wanted)
        packed = swap.detach()
        assert torch.equal(model(x), plain)
        assert fingerprint(model) == before
        assert all(torch.equal(value, weights[name]) for name, value in contents(model).items())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_patches_can_be_changed_while_attached(mode):
    model, x = build("blocks in a list"), inputs()
    plain = model(x)
    patched = build("blocks in a list")
    patched.blocks[1].qkv.weight.add_(1.0)
    patched.embed.weight.add_(2.0)
    wanted = patched(x)
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL), "cpu")
    for _ in range(2):
        assert torch.equal(model(x), plain)
        swap.repack(adding(blocks__1__qkv__weight=1.0, embed__weight=2.0))
        assert torch.equal(model(x), wanted)
        assert torch.equal(model(x), wanted)
        swap.repack(adding())
        assert torch.equal(model(x), plain)


@torch.no_grad()
def test_a_patch_that_fails_while_attached_leaves_the_last_patches_in_force():
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL), "cpu", patches=adding(blocks__1__qkv__weight=1.0))
    wanted = model(x)

    def fail(path, tensor):
        raise RuntimeError("no patch")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="no patch"):
            swap.repack(Patches(lambda path: {QKV: 1.0, OUT: 1.0, "embed.weight": 1}.get(path), fail))
        for _ in range(3):
            assert torch.equal(model(x), wanted)
        assert swap.telemetry.last().misses == 0
        assert swap.streamer.device_bytes == swap.plan.device_bytes


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_patches_that_change_in_the_middle_of_a_forward_are_refused_or_do_no_harm(mode):
    model, x, changes = build("blocks in a list"), inputs(), []
    plain = model(x)
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL), "cpu")
    model(x)

    def before_the_layer(*_):
        for change in changes:
            change()

    model.blocks[2].ffn[0].register_forward_pre_hook(before_the_layer)
    changes.append(lambda: swap.repack(adding(blocks__1__qkv__weight=1.0)))
    try:
        model(x)
    except RuntimeError as refusal:
        assert "while it computes" in str(refusal)  # noqa: PT017
    changes.clear()
    swap.repack(adding())
    for _ in range(3):
        assert torch.equal(model(x), plain)
    assert all(unit.active == 0 for unit in swap.streamer.units)


@torch.no_grad()
def test_a_tied_weight_is_patched_once_and_stays_tied():
    model, x = build("tied weights"), inputs()
    patched = build("tied weights")
    patched.embed.weight.add_(0.5)
    patched.blocks[0].ffn[0].weight.add_(0.25)
    wanted = patched(x)
    swap = attach(
        model, SwapConfig(block_size=SMALL), "cpu", patches=adding(embed__weight=0.5, blocks__0__ffn__0__weight=0.25)
    )
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    assert model.head.weight is model.embed.weight
    swap.detach()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(x), wanted_outputs("tied weights")[0])


# -- quantized weights -------------------------------------------------------------------------------------------------


class QuantLinear(nn.Module):
    """Reads its weight as the class of the weight says."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        weight = self.weight
        if isinstance(weight, QuantParameter | QuantTensor):
            scale = 64.0 if isinstance(weight, QuantTensor) else weight.quant_type
            weight = weight.as_subclass(torch.Tensor).to(x.dtype).reshape(WIDTH, WIDTH) / scale - 1
        return nn.functional.linear(x, weight)


def int8_weight():
    return torch.randint(-128, 127, (WIDTH, WIDTH), dtype=torch.int8)


QUANTIZED = {
    "thin parameters": lambda: QuantParameter(torch.randint(0, 255, (WIDTH * WIDTH,), dtype=torch.uint8), 96.0),
    "thin tensors": lambda: QuantTensor(torch.randint(0, 255, (WIDTH * WIDTH,), dtype=torch.uint8), (WIDTH, WIDTH)),
    "wrappers": lambda: Scaled(int8_weight(), torch.rand(()) / 100, torch.float32),
    "comfy_kitchen": lambda: kitchen_weight(),
}


def kitchen_weight():
    kitchen = pytest.importorskip(
        "comfy_kitchen.tensor", reason="comfy_kitchen, ComfyUI's quantization, is not installed"
    )
    return kitchen.QuantizedTensor.from_float(torch.randn(WIDTH, WIDTH), "TensorCoreFP8Layout")


def quantized_model(kind):
    torch.manual_seed(11)
    model = nn.Module()
    model.blocks = nn.ModuleList(QuantLinear(QUANTIZED[kind]()) for _ in range(6))

    def forward(x):
        for block in model.blocks:
            x = x + torch.tanh(block(x))
        return x

    model.forward = forward
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", QUANTIZED)
@torch.no_grad()
def test_quantized_weights_stream_as_what_they_are(kind, mode):
    model, x = quantized_model(kind), inputs()
    wanted, before = model(x), fingerprint(model)
    swap = attach(model, SwapConfig(mode=mode, block_size=3000, max_vram=7000), "cpu")
    assert swap.packed.left_out == []
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", QUANTIZED)
@torch.no_grad()
def test_a_patch_on_a_quantized_weight_is_taken_off_without_a_trace(kind):
    model, x = quantized_model(kind), inputs()
    other = quantized_model(kind)
    wanted, weight = model(x), model.blocks[2].weight
    other.blocks[2] = other.blocks[4]
    replaced = other(x)
    patches = Patches(lambda path: 1 if path == "blocks.2.weight" else None, lambda *_: other.blocks[4].weight)
    config = SwapConfig(block_size=3000)
    packed = attach(model, config, "cpu").detach()
    swap = attach(model, config, "cpu", patches=patches, packed=packed)
    assert torch.equal(model(x), replaced)
    packed = swap.detach()
    assert torch.equal(model(x), wanted)
    swap = attach(model, config, "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)
    assert model.blocks[2].weight is weight


# -- where weights come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host_budget", [None, 0, 100_000])
@torch.no_grad()
def test_weights_that_lie_in_a_file_stream(host_budget, mode, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build("blocks in a list").state_dict(), path)
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    model.load_state_dict({name: tensor for name, tensor in load_file(path).items()}, assign=True)
    before = fingerprint(model)
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, host_budget=host_budget), "cpu")
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_without_a_budget_weights_stay_where_they_are(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build("blocks in a list").state_dict(), path)
    model = build("blocks in a list")
    model.load_state_dict(load_file(path), assign=True)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    swap = attach(model, SwapConfig(block_size=SMALL, host_budget=0), "cpu")
    assert swap.packed.host_bytes == 0
    model(inputs())
    swap.detach()
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places


@pytest.mark.parametrize("budget", [0, 50_000, 120_000])
def test_no_more_ram_is_taken_than_the_budget(budget):
    packed = packed_model(build("blocks in a list"), budget=budget)
    packed.pack()
    assert packed.host_bytes <= budget
    assert packed.host_bytes + SMALL * 2 > min(budget, packed.packed_bytes)


def test_attaching_again_takes_no_more_ram_than_the_budget_either():
    model, packed, taken = build("blocks in a list"), None, []
    for _ in range(3):
        swap = attach(model, SwapConfig(block_size=SMALL, host_budget=100_000), "cpu", packed=packed)
        taken.append(swap.packed.host_bytes)
        packed = swap.detach()
    assert taken == [taken[0]] * 3
    assert taken[0] <= 100_000


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_model_streams_through_the_staging_ring(name):
    model, x = build(name), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL, host_budget=0, max_vram=200_000), "cpu")
    for result, wanted in zip(outputs(model, CASES[name].calls, x), wanted_outputs(name), strict=True):
        assert torch.equal(result, wanted)
    swap.detach()
    assert torch.equal(outputs(model, CASES[name].calls, x)[0], wanted_outputs(name)[0])


@pytest.mark.parametrize("host_budget", [None, 0])
@torch.no_grad()
def test_a_lazily_conjugated_buffer_in_a_block_streams_as_what_it_reads_as(host_budget):
    model, x = build("buffers"), inputs()
    for block in model.blocks:
        block.turn = block.turn.conj()
    wanted = model(x)
    swap = attach(model, SwapConfig(block_size=SMALL, host_budget=host_budget), "cpu")
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)


# -- the staging ring --------------------------------------------------------------------------------------------------


def staged(pieces, nbytes):
    """What a target of ``nbytes`` holds after ``pieces`` went through a ring."""
    ring, target, done, errors = StagingRing(Link(CPU)), torch.zeros(nbytes, dtype=torch.uint8), threading.Event(), []

    def after(error):
        errors.append(error)
        done.set()

    ring.submit(pieces, target, lambda: None, after)
    assert done.wait(30)
    ring.close()
    return target, errors


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([torch.uint8, torch.float32, torch.bool])), max_size=12)
)
def test_scattered_pieces_arrive_where_they_belong(parts):
    pieces, wanted, offset = [], [], 0
    for number, (count, dtype) in enumerate(parts):
        source = (torch.arange(count) * (number + 3) % 251).to(dtype)
        pieces.append(Piece(source, offset, source.nbytes))
        wanted.append((offset, source))
        offset += source.nbytes + 512 - source.nbytes % 512
    target, errors = staged(pieces[::-1], offset)
    assert errors == [None]
    for begin, source in wanted:
        assert target[begin : begin + source.nbytes].equal(source.view(torch.uint8))


def test_a_piece_larger_than_all_buffers_of_the_ring_arrives_whole():
    nbytes = BUFFERS * BUFFER_BYTES + BUFFER_BYTES // 2 + 77
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target, _ = staged([Piece(source, 5, nbytes)], nbytes + 9)
    assert target[5 : nbytes + 5].equal(source)
    assert not target[:5].any()
    assert not target[nbytes + 5 :].any()


def test_an_error_on_the_way_is_handed_over_and_the_ring_goes_on():
    ring, target, results = StagingRing(Link(CPU)), torch.zeros(8, dtype=torch.uint8), []
    both = threading.Barrier(2)
    source = torch.arange(8, dtype=torch.uint8)

    def after(error):
        results.append(error)
        both.wait(30)

    def fail():
        raise OSError("the disk is gone")

    ring.submit([Piece(source, 0, 8)], target, fail, after)
    both.wait(30)
    ring.submit([Piece(source, 0, 8)], target, lambda: None, after)
    both.wait(30)
    ring.close()
    assert str(results[0]) == "the disk is gone"
    assert results[1] is None
    assert target.equal(source)


def linear_unit(number, layer, in_pieces):
    """A streamed unit of one linear layer, from one buffer or from where its weights are."""
    entries, pieces, offset = [], [], 0
    for name, weight in layer.named_parameters():
        spec = plan_tensor(weight.detach(), offset)
        entries.append((Entry(name, layer._parameters, name, weight, (spec,), flatten(weight)[1]), 0))
        pieces.append(Piece(weight.detach(), offset, weight.nbytes))
        offset += -(-weight.nbytes // 512) * 512
    if in_pieces:
        return StreamUnit(number, offset, entries, pieces)
    buffer = torch.zeros(offset, dtype=torch.uint8)
    for entry, _ in entries:
        entry.specs[0].view(buffer).copy_(entry.host.detach())
    return StreamUnit(number, offset, entries, buffer)


@pytest.mark.parametrize("slots", [0, 2, 3])
@torch.no_grad()
def test_units_in_pieces_and_units_in_one_piece_stream_side_by_side(slots):
    layers = [nn.Linear(50, 50) for _ in range(5)]
    originals = [dict(layer.named_parameters()) for layer in layers]
    units = [linear_unit(number, layer, number % 2 == 0) for number, layer in enumerate(layers)]
    link = Link(CPU)
    streamer = Streamer(link, Telemetry(link))
    streamer.configure(units, units, slots, max(unit.nbytes for unit in units))
    for _ in range(4):
        streamer.begin()
        for number, layer in enumerate(layers):
            streamer.enter(number)
            for name, weight in layer.named_parameters():
                assert weight.equal(originals[number][name])
                assert weight.data_ptr() != originals[number][name].data_ptr()
            streamer.leave(number)
            assert all(layer._parameters[name] is weight for name, weight in originals[number].items())
        streamer.end(True, 0)
    streamer.close()


@torch.no_grad()
def test_a_unit_that_cannot_be_staged_fails_where_it_is_needed_and_can_be_tried_again():
    class Gone(Link):
        failing = True

        def copy(self, target, source):
            if self.failing:
                raise OSError("gone")
            super().copy(target, source)

    layers = [nn.Linear(20, 20) for _ in range(3)]
    units = [linear_unit(number, layer, True) for number, layer in enumerate(layers)]
    link = Gone(CPU)
    streamer = Streamer(link, Telemetry(link))
    streamer.configure(units, units, 2, units[0].nbytes)
    streamer.begin()
    with pytest.raises(OSError, match="gone"):
        streamer.enter(0)
    ahead = streamer.units[1].load
    if ahead is not None:
        ahead.issued.wait(30)  # it failed as well
    streamer.end(False, 0)
    link.failing = False
    for _ in range(2):
        streamer.begin()
        for number, layer in enumerate(layers):
            streamer.enter(number)
            assert layer.weight.equal(units[number].entries[0][0].host)
            streamer.leave(number)
        streamer.end(True, 0)
    streamer.close()
