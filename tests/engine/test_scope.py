"""A host that goes on placing what lies outside blocks, replaces weights between runs, or compiles blocks."""

import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.discover import Scope, find_blocks
from torch import nn

from .models import TOKENS, WIDTH, Block, Transformer, fingerprint

CPU = torch.device("cpu")
INSIDE = Scope(outside=False, leave=frozenset({"number"}), called_alone=frozenset({"before"}))
CONFIG = SwapConfig(block_size=9000, block_names=(".blocks",))


class Adapted(nn.Linear):
    """A linear layer with buffers that its host replaces, and a counter that it writes to."""

    def __init__(self, width):
        super().__init__(width, width)
        self.register_buffer("low", torch.randn(width, 4))
        self.register_buffer("high", torch.randn(4, width))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return nn.functional.linear(x, self.weight + self.low @ self.high * (1 + self.step), self.bias)


class HostBlock(Block):
    """A block with a part that the model calls beside it, and an index that is to stay where it is."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.adapted = Adapted(WIDTH)
        self.register_buffer("number", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return super().forward(x) + self.adapted(x)


class HostModel(Transformer):
    """Calls ``before`` of each block itself, and has another list of blocks that is not its own."""

    def __init__(self):
        super().__init__(HostBlock)
        self.other = nn.Module()
        self.other.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x + block.before(x))
        return self.head(x)


def made():
    torch.manual_seed(0)
    return HostModel().requires_grad_(False), torch.randn(1, TOKENS, WIDTH)


def test_a_name_with_a_dot_before_it_is_a_whole_path():
    model, _ = made()
    assert len(find_blocks(model, ("blocks",))) == 7
    assert [path for path, _ in find_blocks(model, (".blocks",))] == [f"blocks.{index}" for index in range(5)]


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise", "layerwise"])
@torch.no_grad()
def test_what_is_outside_the_scope_stays_with_the_host(mode):
    model, x = made()
    wanted, before = model(x), fingerprint(model)
    weights = {id(weight) for weight in model.embed.parameters()} | {id(model.blocks[2].number)}
    swap = attach(model, SwapConfig(block_size=9000, mode=mode, block_names=(".blocks",)), CPU, scope=INSIDE)
    assert all(torch.equal(model(x), wanted) for _ in range(3))
    assert {id(weight) for weight in model.embed.parameters()} | {id(model.blocks[2].number)} == weights
    assert not any(slotted.path.startswith(("embed", "head", "other")) for slotted in swap.tensors())
    model.embed.to(torch.float64)  # the host's own business
    assert model.embed.weight.dtype == torch.float64
    model.embed.to(torch.float32)
    model.blocks[0].to(torch.float64)  # the engine's
    assert model.blocks[0].qkv.weight.dtype == torch.float32
    swap.detach()
    assert fingerprint(model) == before


@torch.no_grad()
def test_a_meta_weight_outside_the_scope_is_nobodys_concern_and_one_inside_is():
    model, _ = made()
    model.head.to("meta")
    attach(model, CONFIG, CPU, scope=INSIDE).detach()
    with pytest.raises(ValueError, match="on the meta device"):
        attach(model, CONFIG, CPU)
    model.blocks[1].qkv.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        attach(model, CONFIG, CPU, scope=INSIDE)


@torch.no_grad()
def test_a_counter_that_the_host_writes_to_counts():
    model, x = made()
    swap = attach(model, CONFIG, CPU, scope=INSIDE)
    model(x)
    for block in model.blocks:
        block.adapted.step.fill_(3)
    streamed = model(x)
    swap.detach()
    for block in model.blocks:
        block.adapted.step.fill_(3)
    assert torch.equal(streamed, model(x))


# -- replaced weights ------------------------------------------------------------------------------------------------


def again(model, packed):
    swap = attach(model, CONFIG, CPU, packed=packed, scope=INSIDE)
    return swap, swap.packed is packed


@torch.no_grad()
def test_weights_replaced_by_others_of_their_kind_are_packed_again_and_nothing_else():
    model, x = made()
    swap = attach(model, CONFIG, CPU, scope=INSIDE)
    model(x)
    packed = swap.detach()
    kept = {path: weight.data_ptr() for path, weight in model.named_parameters() if path.endswith("qkv.weight")}
    for block in model.blocks[:3]:
        block.adapted.low = torch.randn(WIDTH, 4)
        block.adapted.high = torch.randn(4, WIDTH)
    replaced = [block.adapted.low.clone() for block in model.blocks]
    wanted = model(x)
    swap, same = again(model, packed)
    assert same
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert all(torch.equal(block.adapted.low, low) for block, low in zip(model.blocks, replaced, strict=True))
    assert {path: dict(model.named_parameters())[path].data_ptr() for path in kept} == kept


@torch.no_grad()
def test_a_weight_of_another_kind_or_too_many_of_them_pack_everything_anew():
    model, x = made()
    packed = attach(model, CONFIG, CPU, scope=INSIDE).detach()
    model.blocks[1].adapted.low = torch.randn(WIDTH, 6)
    model.blocks[1].adapted.high = torch.randn(6, WIDTH)
    wanted = model(x)
    swap, same = again(model, packed)
    assert not same
    assert torch.equal(model(x), wanted)
    packed = swap.detach()
    for block in model.blocks:
        block.qkv.weight.data = torch.randn_like(block.qkv.weight)
        block.ffn[0].weight.data = torch.randn_like(block.ffn[0].weight)
    wanted = model(x)
    swap, same = again(model, packed)
    assert not same
    assert torch.equal(model(x), wanted)
    swap.detach()


@torch.no_grad()
def test_weights_that_changed_places_in_packed_memory_are_not_overwritten_by_each_other():
    model, x = made()
    packed = attach(model, CONFIG, CPU, scope=INSIDE).detach()
    first, second = model.blocks[0].out, model.blocks[1].out
    first.weight.data, second.weight.data = second.weight.data, first.weight.data
    wanted = model(x)
    swap, same = again(model, packed)
    assert not same
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)


# -- compiled blocks -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_compiled_block_is_one_layer_beside_the_parts_that_are_called_alone():
    model, x = made()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager", fullgraph=True)
    wanted = model(x)
    swap = attach(model, SwapConfig(block_size=9000, streamed_blocks=3, block_names=(".blocks",)), CPU, scope=INSIDE)
    paths = [layer.layer.path for layer in swap.packed.layers]
    assert paths[:2] == ["blocks.0", "blocks.0._orig_mod.before"]
    assert len(paths) == 10
    assert all(torch.equal(model(x), wanted) for _ in range(3))
    packed = swap.detach()
    # compiled anew, as a host does at each run: the same packing serves
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block._orig_mod, backend="eager", fullgraph=True)
    swap, same = again(model, packed)
    assert same
    assert all(torch.equal(model(x), wanted) for _ in range(2))
    swap.detach()
