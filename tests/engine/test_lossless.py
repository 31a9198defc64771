"""Weights that are kept encoded in RAM and on the link: the model computes what it computed, to the bit, and comes back whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from intelligent_vram.vram import Patches, SwapConfig, attach, live_swap
from intelligent_vram.vram.codec import NoCodec, codec_for
from intelligent_vram.vram.encoded import EncodedTensor, is_encoded
from intelligent_vram.vram.model_headers import Weight
from intelligent_vram.vram.plan import MODES, LayerSize, Timing, cut, fit, simulate, stream_all
from intelligent_vram.vram.predict import as_encoded
from intelligent_vram.vram.units import MIB
from torch import nn

from .models import CASES, STANDARD, build, contents, fingerprint, inputs, outputs
from .subclasses import QuantParameter, Scaled
from .test_whole_life import Life

SMALL = 9000
ON = SwapConfig(block_size=SMALL, lossless="on")
MODEL = "blocks that are skipped"


def big(dtype=torch.bfloat16, count=3, width=256):
    """A model whose encoded weights are clearly smaller."""
    torch.manual_seed(2)

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(count)
            )

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    return Layers().to(dtype).requires_grad_(False)


def values(model):
    """All weights and buffers, decoded."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*CASES, *STANDARD])
@torch.no_grad()
def test_every_model_computes_the_same_and_comes_back_whole(name, mode):
    dtype = None if name in ("buffers", "several dtypes") else torch.bfloat16
    model = build(name, dtype)
    x, calls = inputs(dtype or torch.float32), ({**CASES, **STANDARD}[name].calls or [{}])
    wanted, before, weights = outputs(model, calls, x), fingerprint(model), contents(model)
    swap = attach(model, replace(ON, mode=mode), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, calls, x), wanted, strict=True))
    assert same(values(model), weights)
    swap.detach()
    assert fingerprint(model) == before
    assert same(contents(model), weights)
    assert not any(isinstance(tensor, EncodedTensor) for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_ram_and_link_carry_fewer_bytes_and_telemetry_tells_of_them(dtype):
    model, x = big(dtype), torch.randn(2, 256).to(dtype)
    wanted = model(x)
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3, block_size=1 << 20, slots=2), "cpu")
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    plain = sum(size.nbytes for size in swap.packed.sizes)
    assert swap.packed.host_bytes < 0.97 * plain
    record = swap.telemetry.last(wait=True)
    assert record.decoded_bytes == plain
    assert record.streamed_bytes == record.encoded_bytes == swap.packed.packed_bytes
    assert swap.plan.streamed_bytes == swap.packed.packed_bytes
    assert record.decode_seconds > 0
    assert "encoded" in record.describe()
    assert "encoded" in swap.plan.describe()
    swap.detach()


@torch.no_grad()
def test_device_memory_is_that_of_the_plain_engine_and_two_encoded_units():
    model, x = big(), torch.randn(2, 256).bfloat16()
    taken = {}
    for lossless in ("off", "on"):
        swap = attach(
            model, replace(ON, mode="chunkwise", streamed_blocks=3, block_size=1 << 20, lossless=lossless), "cpu"
        )
        model(x)
        assert swap.streamer.device_bytes <= swap.plan.device_bytes
        taken[lossless], unit = swap.streamer.device_bytes, max(unit.link_bytes for unit in swap.plan.units)
        swap.detach()
    assert taken["on"] == taken["off"] + 2 * unit


@torch.no_grad()
def test_weights_that_are_not_page_locked_and_not_packed_are_decoded_too():
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    for budget in (0, 200_000):
        swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3, host_budget=budget), "cpu")
        for _ in range(3):
            assert torch.equal(model(x), wanted)
        swap.detach()


@torch.no_grad()
def test_layers_that_do_not_get_smaller_stay_as_they_are_beside_others():
    model, x = big(), torch.randn(2, 256).bfloat16()
    noise = torch.randint(0, 0x7F80, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    model.blocks[1][0].weight.copy_(noise * 1e-38)
    model.blocks[1][0].weight.view(torch.int16).bitwise_xor_(torch.randint(0, 256, (256, 256), dtype=torch.int16))
    wanted = model(x)
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3, block_size=1 << 20), "cpu")
    for _ in range(2):
        assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.parametrize(
    "make", [lambda data: QuantParameter(data, "Q8"), lambda data: Scaled(data, torch.tensor(0.5), torch.float32)]
)
@torch.no_grad()
def test_subclasses_survive_it(make):
    model = big(torch.float32)
    torch.manual_seed(1)
    for block in model.blocks:
        for layer in block:
            data = (torch.randn(256, 256) * 10).to(torch.int8)
            layer.weight = nn.Parameter(make(data), requires_grad=False) if make(data).dtype == torch.float32 else None
            if layer.weight is None:
                layer._parameters["weight"] = make(data)

            def forward(x, layer=layer):
                weight = layer._parameters["weight"]
                return nn.functional.linear(x, weight.to(torch.float32) * 0.01, layer.bias)

            layer.forward = forward
    x = torch.randn(2, 256)
    wanted, before = model(x), fingerprint(model)
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3, block_size=1 << 20), "cpu")
    for _ in range(2):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


# -- patches -------------------------------------------------------------------------------------------------------------


def patches(path, amount):
    return Patches(
        lambda p: amount if p == path else None,
        lambda p, tensor: tensor.to(torch.float32).mul(1 + amount).to(tensor.dtype),
    )


@torch.no_grad()
def test_a_patched_weight_is_encoded_patched_and_its_original_stays_what_it_was():
    model, x, path = big(), torch.randn(2, 256).bfloat16(), "blocks.1.0.weight"
    plain = contents(model)
    expected = {}
    for amount in (0.25, 0.5):
        other = big()
        other.blocks[1][0].weight.copy_(plain[path].float().mul(1 + amount).bfloat16())
        expected[amount] = other(x)
    wanted = model(x)
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3), "cpu", patches=patches(path, 0.25))
    assert swap.packed.layers[2].is_encoded
    assert torch.equal(model(x), expected[0.25])
    swap.repack(patches(path, 0.5))
    assert torch.equal(model(x), expected[0.5])
    swap.repack(Patches(lambda p: None, lambda p, tensor: tensor))
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert same(contents(model), plain)


@torch.no_grad()
def test_a_patch_that_makes_a_weight_larger_encoded_is_streamed_plain_with_a_word():
    model, x, path = big(), torch.randn(2, 256).bfloat16(), "blocks.1.0.weight"
    noise = torch.randint(-0x4000, 0x3F00, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    make = Patches(lambda p: 1 if p == path else None, lambda p, tensor: noise)
    other = big()
    other.blocks[1][0].weight.copy_(noise)
    model.head = nn.Linear(8, 8)  # is on the device for good: placed once, although packing begins anew
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3), "cpu", patches=make)
    assert not any(layer.is_encoded for layer in swap.packed.layers)
    assert swap.rest_bytes == 4 * (64 + 8)
    assert sum(slotted.path.startswith("head") for slotted in swap.tensors()) == 2
    assert torch.equal(model(x).view(torch.int16), other(x).view(torch.int16))  # it may be NaN
    swap.detach()


# -- from one time to the next -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_was_encoded_can_be_kept_for_the_next_time():
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted, plain, before = model(x), contents(model), fingerprint(model)
    packed = attach(model, ON, "cpu").detach(keep_encoded=True)
    assert packed is not None
    assert is_encoded(model.blocks[0][0].weight)
    assert same(values(model), plain)
    assert torch.equal(model(x), wanted)
    swap = attach(model, ON, "cpu", packed=packed)
    assert swap.packed is packed
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert same(contents(model), plain)
    assert not is_encoded(model.blocks[0][0].weight)


@torch.no_grad()
def test_a_model_that_was_moved_meanwhile_is_packed_anew():
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    packed = attach(model, ON, "cpu").detach(keep_encoded=True)
    model.float().bfloat16()
    swap = attach(model, ON, "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)


# -- choices -------------------------------------------------------------------------------------------------------------


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="lossless is 'yes'; it must be one of auto, on, off"):
        SwapConfig(lossless="yes")


@torch.no_grad()
def test_where_there_is_no_codec_on_says_what_to_install_and_the_model_is_as_it_was(monkeypatch):
    from intelligent_vram.vram import coding

    def missing(device):
        raise NoCodec("pip install nvidia-libnvcomp-cu13")

    monkeypatch.setattr(coding, "codec_for", missing)
    model = big()
    before = fingerprint(model)
    with pytest.raises(NoCodec, match="pip install"):
        attach(model, ON, "cpu")
    assert fingerprint(model) == before


class EncodedLife(Life):
    """The same life with weights kept encoded, also between times."""

    dtype, lossless = torch.bfloat16, "on"

    def take_off(self):
        return self.swap.detach()


class KeptLife(EncodedLife):
    def take_off(self):
        return self.swap.detach(keep_encoded=True)


TestEncodedLife = EncodedLife.TestCase
TestEncodedLife.settings = settings(max_examples=10, stateful_step_count=12)
TestKeptLife = KeptLife.TestCase
TestKeptLife.settings = settings(max_examples=10, stateful_step_count=12)


# -- planning and telling ------------------------------------------------------------------------------------------------


def test_a_plan_counts_what_crosses_the_link_and_the_buffers_that_it_is_decoded_from():
    plain = [LayerSize(1000 * MIB, index, index) for index in range(8)]
    coded = [layer._replace(encoded=680 * MIB) for layer in plain]
    timing = Timing((0.001,) * 8, 0.0, 50e9, 1e12)
    plans = {name: fit(cut(layers, 1000 * MIB), 7000 * MIB, 2) for name, layers in (("plain", plain), ("coded", coded))}
    for plan in plans.values():
        assert plan.device_bytes <= 7000 * MIB
    assert len(plans["plain"].streamed) == 3
    assert len(plans["coded"].streamed) == 5  # two buffers of 680 MiB take the place of two units
    assert plans["coded"].streamed_bytes == 5 * 680 * MIB
    assert plans["coded"].decoded_bytes == 5 * 1000 * MIB
    every = [stream_all(cut(layers, 1000 * MIB), 3) for layers in (plain, coded)]
    before, after = (simulate(plan, timing) for plan in every)
    assert 0.68 <= after / before < 0.7


def test_prediction_takes_weights_by_their_dtype():
    layers = [LayerSize(1000, 0, 0), LayerSize(2000, 1, 1)]
    bf16 = [Weight("w", "bfloat16", (1500,), 3000), Weight("b", "float32", (2,), 8)]
    assert [layer.link_bytes for layer in as_encoded(layers, bf16)] == [680, 1360]
    assert as_encoded(layers, [Weight("w", "float32", (750,), 3000)]) == tuple(layers)


@torch.no_grad()
def test_the_panel_shows_what_was_decoded():
    model, x = big(), torch.randn(2, 256).bfloat16()
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3, block_size=1 << 20, slots=2), "cpu")
    for _ in range(3):
        model(x)
    steps = live_swap.read_steps(swap, {})
    figures = live_swap.figures_of(swap, steps)
    assert figures.decoded == sum(size.nbytes for size in swap.packed.sizes)
    assert figures.encoded == figures.streamed == swap.packed.packed_bytes
    assert figures.decoding > 0
    swap.detach()


@torch.no_grad()
def test_without_device_memory_for_encoding_the_rest_streams_plain(monkeypatch, caplog):
    codec, calls = codec_for(torch.device("cpu")), []
    encode = codec.encode

    def failing(*args):
        calls.append(args)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no room")
        return encode(*args)

    monkeypatch.setattr(codec, "encode", failing)
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    swap = attach(model, replace(ON, mode="chunkwise", streamed_blocks=3), "cpu")
    assert 0 < sum(layer.is_encoded for layer in swap.packed.layers) < len(swap.packed.layers)
    assert "stream as they are" in caplog.text
    assert torch.equal(model(x), wanted)
    swap.detach()
