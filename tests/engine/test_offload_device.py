"""Weights that stream from another card's memory. On a CPU the other card is a second place in RAM, through the same code."""

import gc
import itertools
import weakref

import pytest
import torch
from intelligent_vram.vram import PackedModel, Patches, SwapConfig, attach
from intelligent_vram.vram.coding import Coding
from intelligent_vram.vram.offload import OffloadDevice, find_offload_device
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.rest import sort_tensors
from safetensors.torch import load_file, save_file

from .models import CASES, build, contents, fingerprint, inputs, outputs, wanted_outputs

CPU = torch.device("cpu")
PLENTY = 1 << 40


def place(room=PLENTY):
    return OffloadDevice(CPU, lambda device: room)


def packed_model(model, config, offload):
    return PackedModel(CPU, sort_tensors(model, config)[0], config.block_size, config.host_budget, offload=offload)


def attached(model, offload, patches=None, packed=None, **settings):
    """Block swap whose segments lie in ``offload``, as ``attach`` does it where there are two cards."""
    config = SwapConfig(**{"mode": "chunkwise", "block_size": 9000, **settings})
    packed = packed or packed_model(model, config, offload)
    packed.offload = offload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intelligent_vram.vram.swap.find_offload_device", lambda *_: offload)
        return attach(model, config, "cpu", packed=packed, **({"patches": patches} if patches else {}))


def adding(amount, which="ffn"):
    return Patches(
        lambda path: amount if which in path and path.endswith("weight") else None, lambda path, tensor: tensor + amount
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("room", [0, 60_000, PLENTY])
@torch.no_grad()
def test_outputs_are_the_same_to_the_bit_however_much_room_the_other_card_has(room, mode):
    name = "blocks in a list"
    model, x = build(name), inputs()
    before, weights = fingerprint(model), contents(model)
    swap = attached(model, place(room), mode=mode)
    assert swap.packed.away_bytes <= room
    assert swap.packed.away_bytes + swap.packed.host_bytes == swap.packed.packed_bytes
    for result, wanted in zip(outputs(model, CASES[name].calls, x), wanted_outputs(name), strict=True):
        assert torch.equal(result, wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert all(torch.equal(weight, weights[path]) for path, weight in contents(model).items())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_model_streams_from_another_card(name):
    model, x = build(name), inputs()
    swap = attached(model, place())
    assert swap.packed.host_bytes == 0
    for result, wanted in zip(outputs(model, CASES[name].calls, x), wanted_outputs(name), strict=True):
        assert torch.equal(result, wanted)
    swap.detach()
    assert torch.equal(outputs(model, CASES[name].calls, x)[0], wanted_outputs(name)[0])


@torch.no_grad()
def test_weights_in_a_file_stay_there_and_take_no_ram(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build("blocks in a list").state_dict(), path)
    model = build("blocks in a list")
    model.load_state_dict(load_file(path), assign=True)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    swap = attached(model, place())
    model(inputs())
    assert swap.packed.host_bytes == swap.packed.arena.page_locked_bytes == 0
    swap.detach()
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places


@torch.no_grad()
def test_the_other_cards_memory_is_given_back_when_the_model_is_detached():
    model = build("blocks in a list")
    swap = attached(model, place())
    segments = [weakref.ref(segment.away.untyped_storage()) for segment in swap.packed._segments]
    packed = swap.detach()
    gc.collect()
    assert [segment for segment in segments if segment() is not None] == []
    assert packed.away_bytes == 0


@torch.no_grad()
def test_patches_are_made_on_the_way_and_changed_in_place():
    model, x = build("blocks in a list"), inputs()
    weights = contents(model)

    def patched(amount):
        other = build("blocks in a list")
        for path, weight in other.named_parameters():
            if adding(amount).signature(path) is not None:
                weight.data += amount
        return other(x)

    swap = attached(model, place(120_000), patches=adding(0.5))
    assert 0 < swap.packed.away_bytes < swap.packed.packed_bytes
    assert torch.equal(model(x), patched(0.5))
    swap.repack(adding(0.25))
    assert torch.equal(model(x), patched(0.25))
    swap.repack(Patches(lambda path: None, lambda path, tensor: tensor))
    assert torch.equal(model(x), patched(0.0))
    swap.detach()
    assert all(torch.equal(weight, weights[path]) for path, weight in contents(model).items())


@torch.no_grad()
def test_a_model_that_was_packed_in_ram_can_stream_from_another_card_and_back():
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    swap = attached(model, None)
    assert torch.equal(model(x), wanted)
    packed = swap.detach()
    swap = attached(model, place(), packed=packed)
    assert swap.packed.away_bytes == swap.packed.packed_bytes
    assert torch.equal(model(x), wanted)
    packed = swap.detach()
    swap = attached(model, None, packed=packed)
    assert swap.packed.away_bytes == 0
    assert torch.equal(model(x), wanted)
    swap.detach()


@torch.no_grad()
def test_too_little_room_is_one_line_in_the_log(caplog):
    swap = attached(build("blocks in a list"), place(60_000))
    told = [line for line in caplog.messages if "has no room for the other" in line]
    assert len(told) == 1
    swap.detach()


@torch.no_grad()
def test_an_interruption_on_the_way_to_the_other_card_leaves_the_model_whole():
    model, calls = build("blocks in a list"), itertools.count()
    before, weights = fingerprint(model), contents(model)
    config = SwapConfig(mode="chunkwise", block_size=9000)
    packed = packed_model(model, config, place())

    def progress(done, total):
        assert 0 < done <= total
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed.pack(progress=progress)
    packed.close()
    assert packed.away_bytes == 0
    assert fingerprint(model) == before
    assert all(torch.equal(weight, weights[path]) for path, weight in contents(model).items())


@pytest.mark.parametrize("room", [60_000, PLENTY])
def test_progress_goes_up_to_its_total(room):
    told = []
    packed = packed_model(build("blocks in a list"), SwapConfig(block_size=9000), place(room))
    assert packed.pack(progress=lambda done, total: told.append((done, total))) == packed.packed_bytes
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (packed.packed_bytes, packed.packed_bytes)
    packed.close()


@torch.no_grad()
def test_weights_that_came_encoded_stay_in_ram():
    model = build("blocks in a list", torch.bfloat16)
    weights, config, coding = contents(model), SwapConfig(mode="chunkwise", block_size=9000), Coding(CPU)
    coding.prepare("on", sort_tensors(model, config)[0], None, None)
    packed = packed_model(model, config, place())
    packed.pack(adding(0.5))
    encoded = [segment for segment in packed._segments if segment.is_encoded]
    assert encoded
    for segment in packed._segments:
        assert (segment.away is None) == segment.is_encoded == (segment.host is not None)
    packed.pack()
    packed.close()
    coding.decode()
    assert all(torch.equal(weight, weights[path]) for path, weight in contents(model).items())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [1, "gpu", "cuda", "cuda:-1", "cuda:1000", "meta", "", "CUDA:1", "cuda:\u0661", b"cpu"]
)
def test_names_that_are_none_are_refused_with_what_would_be_one(name):
    with pytest.raises(ValueError, match=r"offload_device is .*'cuda:1'"):
        SwapConfig(offload_device=name)


@pytest.mark.parametrize("name", [None, "cpu"])
def test_ram_is_the_usual_place(name):
    assert find_offload_device(SwapConfig(offload_device=name).offload_device, CPU) is None


def test_another_card_holds_weights_only_for_a_card():
    model = build("blocks in a list")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="the model computes on cpu"):
        attach(model, SwapConfig(offload_device="cuda:1"), "cpu")
    assert fingerprint(model) == before


def test_a_card_that_is_not_there_and_the_card_that_computes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    computing = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="no such card here; there is cuda:0, cuda:1"):
        find_offload_device("cuda:2", computing)
    with pytest.raises(ValueError, match="the card that the model computes on"):
        find_offload_device("cuda:0", computing)
    assert find_offload_device("cuda:1", computing).device == torch.device("cuda", 1)
