"""Weights that are encoded, or decoded again, while the engine is attached: the model computes the same, whatever happens."""

import weakref
from dataclasses import replace

import pytest
import torch
from intelligent_vram.vram import Patches, SwapConfig, adapt, attach
from intelligent_vram.vram import weights as weights_module
from intelligent_vram.vram.adapt import SETTLED
from intelligent_vram.vram.coding import Coding
from intelligent_vram.vram.discover import take_apart
from intelligent_vram.vram.encoded import EncodedTensor
from intelligent_vram.vram.encoding import Workers
from intelligent_vram.vram.packing import PackedModel
from intelligent_vram.vram.telemetry import ForwardRecord, Interval
from intelligent_vram.vram.worth import Rates, plain_is_shorter, waits_for_copies

from .models import contents
from .test_lossless import big, patches, same, values

RATES = Rates(link=1e9, decoding=1e15, kept=0.67)
CONFIG = SwapConfig(mode="chunkwise", streamed_blocks=3, block_size=1 << 20)
ADAPTIVE = SwapConfig(block_size=1 << 20)
LAYERWISE = SwapConfig(mode="layerwise", block_size=1 << 20)
PATH = "blocks.1.0.weight"
X = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """RAM for all, whatever else runs on this machine."""
    monkeypatch.setattr(weights_module, "ram", lambda: (1 << 40, 1 << 40))


def encoded(swap) -> bool:
    return any(layer.is_encoded for layer in swap.packed.layers)


def with_patch(amount):
    """The output of a model with a patched weight, without the engine."""
    model = big()
    model.blocks[1][0].weight.copy_(model.blocks[1][0].weight.float().mul(1 + amount).bfloat16())
    return model(X)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, mode="adaptive", streamed_blocks=None), replace(CONFIG, host_budget=0)]
)
@torch.no_grad()
def test_outputs_are_the_same_before_and_after_and_the_model_comes_back_whole(config):
    model = big()
    wanted, before = model(X), contents(model)
    swap = attach(model, config, "cpu")
    for rates in (RATES, None, RATES):
        assert torch.equal(model(X), wanted)
        swap.take_other_weights(rates)
        assert encoded(swap) == (rates is not None)
        for _ in range(3):
            assert torch.equal(model(X), wanted)
        assert same(values(model), before)
    assert swap.packed.host_bytes <= swap.packed.packed_bytes
    swap.detach()
    assert same(contents(model), before)
    assert torch.equal(model(X), wanted)


@torch.no_grad()
def test_a_lora_stays_in_force_and_can_be_changed_and_taken_off():
    model = big()
    wanted, before = model(X), contents(model)
    swap = attach(model, CONFIG, "cpu", patches=patches(PATH, 0.25))
    for rates, amount in ((RATES, 0.5), (None, 0.25)):
        swap.take_other_weights(rates)
        swap.repack(patches(PATH, amount))
        assert torch.equal(model(X), with_patch(amount))
    swap.take_other_weights(RATES)
    assert torch.equal(model(X), with_patch(0.25))
    swap.repack(Patches(lambda path: None, lambda path, tensor: tensor))
    assert torch.equal(model(X), wanted)
    swap.detach()
    assert same(contents(model), before)


class Broken(Exception):
    pass


STEPS = {
    "encoding": (Workers, "encode"),
    "decoding": (EncodedTensor, "decode"),
    "laying out": (weights_module, "PackedModel"),
    "packing": (PackedModel, "_write"),
}


@pytest.mark.parametrize("error", [Broken, torch.OutOfMemoryError])
@pytest.mark.parametrize("config", [CONFIG, ADAPTIVE])
@pytest.mark.parametrize("rates", [RATES, None])
@pytest.mark.parametrize("call", [1, 3, 6])
@pytest.mark.parametrize("where", [*STEPS, "progress"])
@torch.no_grad()
def test_when_it_breaks_off_the_next_forward_is_right_also_with_another_lora(
    monkeypatch, where, call, rates, config, error
):
    """The n-th call of a step raises, once. Where the step is not called so often, nothing does."""
    count = 0

    def broken(original):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                raise error(where)
            return original(*args, **kwargs)

        return step

    model = big()
    before = contents(model)
    progress = [lambda done, total: None]
    swap = attach(
        model, config, "cpu", patches=patches(PATH, 0.25), progress=lambda done, total: progress[0](done, total)
    )
    if rates is None:
        swap.take_other_weights(RATES)
    for _ in range(3):
        assert torch.equal(model(X), with_patch(0.25))
    resident = len(swap.plan.resident)
    if where == "progress":
        progress[0] = broken(progress[0])
    else:
        owner, name = STEPS[where]
        monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    raised = False
    try:
        swap.take_other_weights(rates)
    except error:
        raised = True
    assert raised == (count >= call) or error is torch.OutOfMemoryError  # want of memory is answered where it can be
    monkeypatch.undo()
    progress[0] = lambda done, total: None
    for _ in range(3):
        assert torch.equal(model(X), with_patch(0.25))
    assert len(swap.plan.resident) == resident
    assert swap.packed.owner is swap
    swap.repack(patches(PATH, 0.5))
    assert torch.equal(model(X), with_patch(0.5))
    swap.detach()
    assert same(contents(model), before)


@pytest.mark.parametrize("again", ["progress", "encoding", "decoding", "packing"])
@torch.no_grad()
def test_when_it_breaks_off_twice_a_lora_can_be_changed_all_the_same(monkeypatch, again):
    model = big()
    swap = attach(model, CONFIG, "cpu", patches=patches(PATH, 0.25))
    swap.take_other_weights(RATES)
    owner, name = STEPS.get(again, (PackedModel, "pack"))

    def broken(*args, **kwargs):
        raise Broken(again)

    monkeypatch.setattr(EncodedTensor, "decode", broken)
    with pytest.raises(Broken):
        swap.take_other_weights(None)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Broken):
        model(X)
    monkeypatch.undo()
    swap.repack(patches(PATH, 0.5))
    assert torch.equal(model(X), with_patch(0.5))
    assert torch.equal(model(X), with_patch(0.5))
    swap.detach()


@torch.no_grad()
def test_a_lora_that_does_not_fit_encoded_makes_weights_plain_when_it_is_changed_to():
    model = big()
    before = contents(model)
    noise = torch.randint(-0x4000, 0x3F00, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    other = big()
    other.blocks[1][0].weight.copy_(noise)
    swap = attach(model, CONFIG, "cpu", patches=patches(PATH, 0.25))
    swap.take_other_weights(RATES)
    swap.repack(Patches(lambda path: 1 if path == PATH else None, lambda path, tensor: noise))
    for _ in range(3):
        assert torch.equal(model(X).view(torch.int16), other(X).view(torch.int16))  # it may be NaN
    assert not encoded(swap)
    swap.detach()
    assert same(contents(model), before)


@torch.no_grad()
def test_the_old_packed_memory_is_given_back_before_the_new_is_packed(monkeypatch):
    model = big()
    swap = attach(model, CONFIG, "cpu")
    model(X)
    gone = [weakref.ref(segment.host.buffer.untyped_storage()) for segment in swap.packed._segments]
    left = []
    pack = PackedModel.pack

    def look(self, *args):
        left.extend(storage() is not None for storage in gone)
        return pack(self, *args)

    monkeypatch.setattr(PackedModel, "pack", look)
    swap.take_other_weights(RATES)
    assert left
    assert not any(left)
    swap.detach()


@torch.no_grad()
def test_settings_that_change_between_two_attachments_count(monkeypatch):
    monkeypatch.setattr(Coding, "fast", property(lambda self: True))
    monkeypatch.setattr(Coding, "faster", lambda self, layers, record: RATES)
    model = big()
    wanted, before = model(X), contents(model)
    packed = None
    for config, expected in (
        (CONFIG, True),
        (LAYERWISE, False),  # what was encoded for speed is not what the mode for the least memory wants
        (CONFIG, True),
        (replace(CONFIG, lossless="off"), False),
        (CONFIG, True),
        (replace(CONFIG, lossless="on"), True),
        (LAYERWISE, False),
    ):
        swap = attach(model, config, "cpu", packed=packed)
        for _ in range(3 * SETTLED):
            assert torch.equal(model(X), wanted)
        assert encoded(swap) == expected, config
        packed = swap.detach(keep_encoded=True)
    packed.coding.decode()
    assert same(contents(model), before)


def test_where_encoding_does_not_work_nothing_fails_for_speed(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("nvCOMP could not encode weights")

    coding, layers = Coding(torch.device("cpu")), list(take_apart(big()).inside)
    slow = record(0.2, 0.15, 0.2)
    monkeypatch.setattr(Workers, "measure", broken)
    assert coding.faster(layers, slow) is None
    monkeypatch.setattr(Workers, "encode", broken)
    coding = Coding(torch.device("cpu"))
    coding.prepare("auto", layers, None, None, RATES)
    assert caplog.text.count("that does not work here") == 2
    assert not coding.fast
    with pytest.raises(RuntimeError, match="could not encode"):
        coding.prepare("on", layers)


@torch.no_grad()
def test_it_is_asked_once_a_size_of_inputs_when_the_plan_is_settled(monkeypatch):
    model, asked = big(), []
    swap = attach(model, CONFIG, "cpu")

    def faster(self, layers, record):
        asked.append(record)
        return RATES

    def plain(record):
        asked.append(record)
        return True

    monkeypatch.setattr(Coding, "fast", property(lambda self: True))
    monkeypatch.setattr(Coding, "faster", faster)
    monkeypatch.setattr(adapt, "plain_is_shorter", plain)
    wanted, larger = type(model).forward(model, X), torch.cat([X, X])
    for _ in range(3 * SETTLED):
        assert torch.equal(model(X), wanted)
    assert len(asked) == 1
    assert encoded(swap)
    for _ in range(3 * SETTLED):
        model(larger)
    assert len(asked) == 2
    assert not encoded(swap)
    for _ in range(3 * SETTLED):
        assert torch.equal(model(X), wanted)
    assert len(asked) == 2
    swap.detach()


@pytest.mark.parametrize("forwards", [1, 2])
@torch.no_grad()
def test_what_a_short_run_showed_counts_when_the_model_is_attached_again(monkeypatch, forwards):
    monkeypatch.setattr(Coding, "fast", property(lambda self: True))
    monkeypatch.setattr(Coding, "faster", lambda self, layers, record: RATES)
    model = big()
    wanted, before = model(X), contents(model)
    swap = attach(model, CONFIG, "cpu")
    for _ in range(forwards):
        assert torch.equal(model(X), wanted)
    packed = swap.detach(keep_encoded=True)
    swap = attach(model, CONFIG, "cpu", packed=packed)
    assert torch.equal(model(X), wanted)
    assert encoded(swap) == (forwards > 1)  # the first forward is measured, and shows no plan that was decided
    swap.detach()
    assert same(contents(model), before)


@torch.no_grad()
def test_without_ram_for_both_and_where_the_user_chose_nothing_is_encoded(monkeypatch):
    monkeypatch.setattr(Coding, "fast", property(lambda self: True))
    monkeypatch.setattr(Coding, "faster", lambda self, layers, record: RATES)
    for config, available in ((CONFIG, 0), (replace(CONFIG, lossless="off"), 1 << 40), (LAYERWISE, 1 << 40)):
        monkeypatch.setattr(weights_module, "ram", lambda available=available: (1 << 40, available))
        model = big()
        swap = attach(model, config, "cpu")
        for _ in range(3 * SETTLED):
            model(X)
        assert not encoded(swap)
        swap.detach()


@torch.no_grad()
def test_weights_whose_lora_does_not_fit_encoded_are_plain_again():
    model = big()
    noise = torch.randint(-0x4000, 0x3F00, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    swap = attach(
        model, CONFIG, "cpu", patches=Patches(lambda path: 1 if path == PATH else None, lambda path, tensor: noise)
    )
    wanted = model(X)
    swap.take_other_weights(RATES)
    assert not encoded(swap)
    assert torch.equal(model(X).view(torch.int16), wanted.view(torch.int16))  # it may be NaN
    swap.detach()


# -- what is faster ------------------------------------------------------------------------------------------------------


def record(seconds: float, stall: float, copying: float, **other) -> ForwardRecord:
    """A forward that moved 10 GB."""
    values = dict(index=0, streamed_bytes=10 * 10**9, peak_bytes=0, host_seconds=0.0, misses=0, units=(), arrivals=())
    return ForwardRecord(seconds=seconds, stall=stall, copies=(Interval(0, 0.0, copying),), **{**values, **other})


def test_encoding_is_worth_it_where_copies_are_what_a_forward_waits_for():
    rates = Rates(link=50e9, decoding=1e12, kept=0.67)
    weights = 10 * 10**9
    assert rates.shorten(record(0.2, 0.15, 0.2), weights)
    assert not rates.shorten(record(0.2, 0.001, 0.19), weights)  # compute takes as long
    assert not rates.shorten(record(0.2, 0.15, 0.2), 1000 * weights)  # encoding would take longer than it ever saves
    assert not Rates(50e9, 20e9, 0.67).shorten(record(0.2, 0.15, 0.2), weights)  # decoding is slower than the link
    assert not waits_for_copies(record(0.2, 0.001, 0.19))


def test_plain_is_shorter_where_decoding_lengthens_compute():
    coded = dict(encoded_bytes=10 * 10**9, decoded_bytes=15 * 10**9, decode_seconds=0.01)
    assert plain_is_shorter(record(0.4, 0.0, 0.2, **coded))
    assert not plain_is_shorter(record(0.4, 0.0, 0.3, **coded))  # plain copies would take 0.45 s
    assert not plain_is_shorter(record(2.0, 0.0, 0.2, **coded))  # half a percent
    assert not plain_is_shorter(record(0.4, 0.0, 0.2))
