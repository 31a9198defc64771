"""Weights that come encoded from a file: streamed as they are, verified before anything of them is decoded."""

import copy
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from intelligent_vram.quant.lossless import compress_file
from intelligent_vram.vram import LimitTooSmall, Patches, arena, attach, verification
from intelligent_vram.vram import encoded as encoded_module
from intelligent_vram.vram.codec import CHUNK, Corrupt, codec_for, kind_of, room_for
from intelligent_vram.vram.decoding import Decoder
from intelligent_vram.vram.encoded import EncodedTensor, checksum_of, is_encoded
from intelligent_vram.vram.encoded_file import load_encoded
from intelligent_vram.vram.layout import TensorSpec
from intelligent_vram.vram.mapped_files import MAPS, FileCutOff
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.unit_coding import copy_encoded, plan_encoded
from intelligent_vram.vram.weights import Weights
from safetensors.torch import save_file
from torch import nn

from .models import contents
from .test_lossless import ON, SMALL, big, same, values

CONFIG = replace(ON, mode="chunkwise", streamed_blocks=3)


def encoded(tensor):
    """As it comes from a file."""
    codec = codec_for(torch.device("cpu"))
    target = torch.zeros(room_for(tensor.nbytes), dtype=torch.uint8)
    chunks = codec.encode(tensor.contiguous().view(-1).view(torch.uint8), kind_of(tensor.dtype), target)
    data = target[: chunks.encoded].clone()
    return nn.Parameter(
        EncodedTensor(data, tensor.dtype, tensor.shape, tensor.stride(), codec.name, CHUNK, "w", checksum_of(data)),
        requires_grad=False,
    )


def encode_all(model):
    for block in model.blocks:
        for layer in block:
            layer.weight = encoded(layer.weight)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lossless", ["auto", "on", "off"])
@torch.no_grad()
def test_weights_that_come_encoded_are_streamed_as_the_choice_says(lossless, mode):
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted, plain = model(x), contents(model)
    encode_all(model)
    swap = attach(model, replace(ON, mode=mode, lossless=lossless), "cpu")
    assert any(layer.is_encoded for layer in swap.packed.layers) is (lossless == "on")
    for _ in range(2):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert same(values(model), plain)
    assert is_encoded(model.blocks[0][0].weight) is (lossless == "on")


@pytest.mark.parametrize("damage", [0, 70_000, -1])
@pytest.mark.parametrize("budget", [None, 0, 300_000])
@pytest.mark.parametrize("block_size", [SMALL, 1 << 30])
@torch.no_grad()
def test_a_damaged_weight_is_found_before_it_is_decoded_and_named(budget, damage, block_size, monkeypatch):
    model, x, decoded = encode_all(big()), torch.randn(2, 256).bfloat16(), []
    model.blocks[2][1].weight.encoded[damage] ^= 1
    kept = {name: tensor.encoded.clone() for name, tensor in model.named_parameters() if is_encoded(tensor)}
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda *args: (decode(*args), decoded.append(args[1].index)))
    config = replace(CONFIG, host_budget=budget, block_size=block_size)
    if budget is not None:  # then it stays in its file
        with pytest.raises(Corrupt, match="w is damaged"):
            attach(model, config, "cpu")
    else:
        swap = attach(model, config, "cpu")
        last = len(swap.plan.units) - 1
        for _ in range(2):
            with pytest.raises(Corrupt, match="w is damaged"):
                model(x)
        swap.detach()
    assert budget is not None or last not in decoded
    assert "forward" not in vars(model)
    encoded = {name: tensor.encoded for name, tensor in model.named_parameters() if is_encoded(tensor)}
    assert all(torch.equal(encoded[name][: len(before)], before) for name, before in kept.items())


@torch.no_grad()
def test_a_unit_waits_until_it_is_verified_and_no_longer(monkeypatch):
    model, x = encode_all(big()), torch.randn(2, 256).bfloat16()
    wanted = copy.deepcopy(model)(x)
    verify, go, begun = EncodedTensor.verify, threading.Event(), threading.Event()
    held = model.blocks[2][0].weight

    def wait_and_verify(tensor):
        if tensor is held:
            begun.set()
            assert go.wait(60)
        verify(tensor)

    monkeypatch.setattr(EncodedTensor, "verify", wait_and_verify)
    swap, reached = attach(model, CONFIG, "cpu"), []
    model.blocks[1].register_forward_hook(lambda *_: reached.append(True))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(torch.no_grad()(model), x)
        assert begun.wait(60)
        assert not wait([future], 0.2).done
        go.set()
        assert torch.equal(future.result(60), wanted)
    assert reached
    assert all(layer.weight.checksum is None for block in model.blocks for layer in block)
    swap.detach()


@torch.no_grad()
def test_a_damaged_weight_keeps_nothing_of_the_forwards_that_failed():
    model, seen = encode_all(big()), []
    model.blocks[2][1].weight.encoded[-1] ^= 1
    swap = attach(model, CONFIG, "cpu")
    for _ in range(2):
        x = torch.randn(2, 256).bfloat16()
        seen.append(weakref.ref(x))
        with pytest.raises(Corrupt, match="w is damaged"):
            model(x)
        del x
    seen += [weakref.ref(slot.buffer) for slot in swap.streamer.slots]
    packed = swap.detach(keep_encoded=True)
    assert packed is not None
    assert [ref() for ref in seen] == [None] * len(seen)


@torch.no_grad()
def test_a_patch_may_change_while_weights_are_verified(monkeypatch):
    model, x = encode_all(big()), torch.randn(2, 256).bfloat16()
    patches = Patches(lambda path: 1 if path.endswith("weight") else None, lambda path, tensor: tensor * 2)
    wanted, patched = copy.deepcopy(model)(x), copy.deepcopy(model)
    for block in patched.blocks:
        for layer in block:
            layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    verify = EncodedTensor.verify
    monkeypatch.setattr(EncodedTensor, "verify", lambda tensor: (time.sleep(0.02), verify(tensor)))
    monkeypatch.setattr(verification, "thread_count", lambda: 1)
    swap = attach(model, CONFIG, "cpu")
    swap.repack(patches)
    assert torch.equal(model(x), patched(x))
    swap.repack(Patches(lambda path: None, lambda path, tensor: tensor))
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("number", range(7))
@torch.no_grad()
def test_threads_that_cannot_be_started_do_not_let_a_weight_pass_unverified(number, monkeypatch):
    model, x, calls = encode_all(big()), torch.randn(2, 256).bfloat16(), []
    wanted = copy.deepcopy(model)(x)

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            calls.append(args)
            if len(calls) == number + 1:
                raise RuntimeError("can't start new thread")
            return super().submit(*args)

    monkeypatch.setattr(verification, "ThreadPoolExecutor", Pool)
    if number < 6:
        with pytest.raises(RuntimeError, match="new thread"):
            attach(model, CONFIG, "cpu")
    swap = attach(model, CONFIG, "cpu")
    assert torch.equal(model(x), wanted)
    assert all(layer.weight.checksum is None for block in model.blocks for layer in block)
    swap.detach()


def test_a_gate_verifies_what_no_thread_did():
    whole, damaged = (encoded(big().blocks[0][0].weight) for _ in range(2))
    damaged.encoded[-1] ^= 1
    gate = verification.Gate([whole, damaged])
    for _ in range(2):
        with pytest.raises(Corrupt, match="w is damaged"):
            gate()
    damaged.encoded[-1] ^= 1
    gate()
    assert whole.checksum is None
    assert damaged.checksum is None


def test_a_weight_can_be_verified_by_two_threads_at_once(monkeypatch):
    weight, calls = encoded(big().blocks[0][0].weight), []

    def checksum_while_another_thread_verifies(data):
        calls.append(data)
        if len(calls) == 1:
            weight.verify()
        return checksum_of(data)

    monkeypatch.setattr(encoded_module, "checksum_of", checksum_while_another_thread_verifies)
    weight.verify()
    assert len(calls) == 2
    assert weight.checksum is None


@torch.no_grad()
def test_what_was_not_verified_when_the_model_was_taken_off_is_when_it_is_attached_again(monkeypatch):
    model, x, begun, cancelled = encode_all(big()), torch.randn(2, 256).bfloat16(), [], threading.Event()
    wanted = copy.deepcopy(model)(x)

    def wait_for_the_running_one(futures):
        if futures:
            cancelled.set()
        wait(futures)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "thread_count", lambda: 1)
        patch.setattr(verification, "wait", wait_for_the_running_one)
        patch.setattr(EncodedTensor, "verify", lambda tensor: (begun.append(tensor), cancelled.wait(60)))
        packed = attach(model, CONFIG, "cpu").detach(keep_encoded=True)
    assert len(begun) <= 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("intelligent-vram-verify")]
    damaged = model.blocks[1][1].weight
    damaged.encoded[-damaged.encoded.nbytes // 2] ^= 1
    swap = attach(model, CONFIG, "cpu", packed=packed)
    with pytest.raises(Corrupt, match="w is damaged"):
        model(x)
    damaged.encoded[-damaged.encoded.nbytes // 2] ^= 1
    packed = swap.detach(keep_encoded=True)
    swap = attach(model, CONFIG, "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.parametrize("budget", [None, 0])
@torch.no_grad()
def test_bytes_behind_the_last_chunk_are_damage(budget):
    model = encode_all(big())
    layer = model.blocks[1][0]
    longer = layer.weight.over(torch.cat((layer.weight.encoded, torch.zeros(9000, dtype=torch.uint8))))
    longer.checksum = checksum_of(longer.encoded)
    layer.weight = nn.Parameter(longer, requires_grad=False)

    def run():
        attach(model, replace(CONFIG, host_budget=budget), "cpu")
        model(torch.randn(2, 256).bfloat16())

    with pytest.raises(Corrupt, match="w is damaged"):
        run()


@pytest.mark.parametrize("stop", [False, True])
@torch.no_grad()
def test_what_stays_in_its_file_is_verified_with_progress_and_can_be_interrupted(stop):
    model, x, told = encode_all(big()), torch.randn(2, 256).bfloat16(), []
    layers = [layer for block in model.blocks for layer in block]
    for layer in layers:
        layer.bias = None
    nbytes = sum(len(layer.weight.encoded) for layer in layers)
    wanted = copy.deepcopy(model)(x)

    def progress(done, total):
        told.append((done, total))
        if stop and len(told) == 2:
            raise KeyboardInterrupt

    def run():
        return attach(model, config, "cpu", progress=progress)

    config = replace(ON, mode="chunkwise", streamed_blocks=3, host_budget=0)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(told) == 2
    else:
        swap = run()
        assert torch.equal(model(x), wanted)
        swap.detach()
        assert len(told) == 6
        assert told[-1] == (nbytes, nbytes)
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_a_weight_that_was_loaded_again_takes_the_place_of_a_damaged_one():
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    mended = encoded(model.blocks[1][0].weight)
    table = encode_all(model).blocks[1][0].weight.encoded[:4].view(torch.int32)
    table -= 64  # is possible, and wrong
    swap = attach(model, CONFIG, "cpu")
    with pytest.raises(Corrupt, match="w is damaged"):
        model(x)
    packed = swap.detach(keep_encoded=True)
    model.blocks[1][0].weight = mended
    swap = attach(model, CONFIG, "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.parametrize(
    ("config", "mended_at"),
    [(replace(CONFIG, host_budget=0), 1), (replace(CONFIG, max_vram=1000), 2)],
    ids=["streams from its file", "the table was read, and no more"],
)
@torch.no_grad()
def test_a_file_that_was_mended_in_place_can_be_attached(config, mended_at):
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    table = encode_all(model).blocks[1][0].weight.encoded[:4].view(torch.int32)
    table -= 64  # is possible, and wrong
    with pytest.raises((Corrupt, LimitTooSmall)):
        attach(model, config, "cpu")
    table += 64
    for attempt in range(mended_at):
        try:
            swap = attach(model, CONFIG, "cpu")
        except Corrupt:
            assert attempt == 0
    assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.parametrize("position", [0, -1])
@torch.no_grad()
def test_what_was_packed_before_setting_up_broke_off_is_verified_too(position):
    model = encode_all(big())

    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attach(model, CONFIG, "cpu", progress=progress)
    weights = [layer.weight for block in model.blocks for layer in block]
    assert all(weight.checksum is not None for weight in weights)
    weights[position].encoded[0] ^= 1
    swap = attach(model, CONFIG, "cpu")
    with pytest.raises(Corrupt, match="w is damaged"):
        model(torch.randn(2, 256).bfloat16())
    swap.detach()


@torch.no_grad()
def test_a_state_dict_from_before_reads_as_it_did():
    model = big()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = encode_all(model).state_dict()
    packed = attach(model, CONFIG, "cpu").detach(keep_encoded=True)
    assert packed is not None
    assert all(torch.equal(before[name].clone(), tensor) for name, tensor in plain.items())


@torch.no_grad()
def test_what_changed_since_it_got_its_place_is_not_written_over_its_neighbour():
    weight = encoded(big().blocks[0][0].weight)
    spec = plan_encoded(weight, 0)
    smaller = TensorSpec(0, len(weight.encoded) - 16, torch.uint8, (len(weight.encoded) - 16,), (1,))
    buffer = torch.zeros(spec.nbytes, dtype=torch.uint8)
    with pytest.raises(Corrupt, match="w has changed"):
        copy_encoded(smaller, weight, buffer)
    assert not buffer.any()
    copy_encoded(spec, weight, buffer)
    assert torch.equal(buffer[: len(weight.encoded)], weight.encoded)


@torch.no_grad()
def test_what_did_not_fit_encoded_is_given_back_before_all_is_packed_plain(monkeypatch):
    made, real = [], arena.HostSegment

    class Segment(real):
        def __init__(self, nbytes):
            super().__init__(nbytes)
            made.append(weakref.ref(self))

    def lay_out(self, lossless, rates=None):
        packed = 0 if self.packed is None else sum(segment.packed for segment in self.packed._segments)
        left.append(sum(segment() is not None for segment in made) - packed)
        return lay_out_again(self, lossless, rates)

    monkeypatch.setattr(arena, "HostSegment", Segment)
    left, lay_out_again = [], Weights.lay_out
    monkeypatch.setattr(Weights, "lay_out", lay_out)
    noise = torch.randint(-0x4000, 0x3F00, (256, 256), dtype=torch.int16).view(torch.bfloat16)
    patches = Patches(lambda path: 1 if path == "blocks.2.0.weight" else None, lambda path, tensor: noise)
    swap = attach(big(), CONFIG, "cpu", patches=patches)
    assert not any(layer.is_encoded for layer in swap.packed.layers)
    assert left == [0, 0]
    assert len(made) > len(swap.packed.layers) // 2
    swap.detach()


@torch.no_grad()
def test_a_file_that_was_mended_before_it_was_verified_is_read_anew():
    model, x = big(), torch.randn(2, 256).bfloat16()
    wanted = model(x)
    table = encode_all(model).blocks[1][0].weight.encoded[:1]
    table ^= 2  # a chunk is 2 bytes longer or shorter, and all lie where they did
    with pytest.raises(LimitTooSmall):
        attach(model, replace(CONFIG, max_vram=1000), "cpu")
    table ^= 2
    swap = attach(model, CONFIG, "cpu")
    assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.skipif(not MAPS.exists(), reason="which files are mapped is known on Linux only")
@pytest.mark.parametrize("lossless", ["on", "off"])
@torch.no_grad()
def test_a_file_that_was_cut_off_is_told_before_its_tables_are_read(lossless, tmp_path):
    model, plain, packed = big(), tmp_path / "plain.safetensors", tmp_path / "encoded.safetensors"
    save_file(model.state_dict(), plain)
    compress_file(plain, packed, torch.device("cpu"))
    model.load_state_dict(load_encoded(packed)[0], assign=True)
    os.truncate(packed, packed.stat().st_size // 8)
    with pytest.raises(FileCutOff, match="was cut off"):
        attach(model, replace(CONFIG, lossless=lossless), "cpu")
    assert "forward" not in vars(model)
