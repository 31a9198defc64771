"""A model with block swap attached computes what it computed before, and after detaching it is the model that came in."""

import gc
import itertools
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.units import MIB
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .models import (
    CASES,
    LIMITS,
    STANDARD,
    WIDTH,
    Block,
    Transformer,
    build,
    contents,
    fingerprint,
    inputs,
    limit_called,
    outputs,
    wanted_outputs,
    weight_bytes,
)

SMALL = 9000  # bytes: units of one to three layers of the test models
# a unit is a layer, a few layers, many blocks; of these only the limit matters to layerwise mode
SETTINGS = [
    *(
        (mode, *setting)
        for mode in ("adaptive", "chunkwise")
        for setting in ((1, "smallest"), (SMALL, "half of the weights"))
    ),
    ("adaptive", 1 * MIB, "automatic"),
    ("layerwise", SMALL, "half of the weights"),
]


def equal(one, other):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_contents(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def attach_small(model, mode="adaptive", block_size=SMALL, **settings):
    return attach(model, SwapConfig(mode=mode, block_size=block_size, **settings), "cpu")


@pytest.mark.parametrize(("mode", "block_size", "limit"), SETTINGS)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_forwards_are_the_same_while_attached_and_after_and_the_model_comes_back_whole(name, mode, block_size, limit):
    model, x, calls, wanted = build(name), inputs(), CASES[name].calls, wanted_outputs(name)
    before, weights = fingerprint(model), contents(model)
    max_vram = limit_called(limit, model, mode=mode, block_size=block_size)

    swap = attach_small(model, mode, block_size, max_vram=max_vram)
    assert equal(outputs(model, calls, x), wanted)
    swap.detach()

    assert fingerprint(model) == before
    assert same_contents(contents(model), weights)
    assert equal(outputs(model, calls[:1], x), wanted[:1])
    if not any(weight.is_complex() for weight in model.buffers()):
        model.to(torch.float64)
        assert all(weight.dtype == torch.float64 for weight in model.parameters() if weight.is_floating_point())


@pytest.mark.parametrize("mode", ["adaptive", "layerwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["multi-head attention", "tables around children"])
@torch.no_grad()
def test_every_dtype_streams(name, dtype, mode):
    model, x = build(name, dtype), inputs(dtype)
    wanted = outputs(model, [{}] * 3, x)
    attach_small(model, mode, max_vram=limit_called("half of the weights", model, mode=mode, block_size=SMALL))
    assert equal(outputs(model, [{}] * 3, x), wanted)


class HostReads(TorchDispatchMode):
    """Notes every operation, but for copies and views, that takes a tensor of ``storages``."""

    HARMLESS = (
        "aten.copy_.default",
        "aten.slice.Tensor",
        "aten.view.dtype",
        "aten.as_strided.default",
        "aten.detach.default",
    )

    def __init__(self, storages):
        super().__init__()
        self.storages = storages
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in self.HARMLESS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() in self.storages:
                    self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "layerwise") for name in CASES),
        *((name, mode) for name in STANDARD for mode in MODES),
        ("tied weights", "adaptive"),
    ],
)
@torch.no_grad()
def test_nothing_computes_with_a_weight_in_host_memory(name, mode):
    """On a GPU that would be "Expected all tensors to be on the same device"."""
    model, x = build(name), inputs()
    wanted = model(x)
    limit = limit_called("half of the weights", model, mode=mode, block_size=SMALL)
    swap = attach_small(model, mode, max_vram=limit)
    reads = HostReads({slotted.tensor.untyped_storage().data_ptr() for slotted in swap.tensors()})
    with reads:
        assert torch.equal(model(x), wanted)
        assert torch.equal(model(x), wanted)
    assert reads.found == set()


# -- autograd and inference mode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "context"),
    [*((name, torch.enable_grad) for name in CASES), *((name, torch.inference_mode) for name in (*CASES,)[::3])],
)
def test_forwards_are_the_same_with_grad_and_in_inference_mode(name, context):
    model, x, calls = build(name).requires_grad_(False), inputs(), CASES[name].calls
    max_vram = limit_called("half of the weights", model, block_size=SMALL)
    with context():
        wanted = outputs(model, calls, x)
        swap = attach_small(model, max_vram=max_vram)
        assert equal(outputs(model, calls, x), wanted)
        swap.detach()
        assert equal(outputs(model, calls, x), wanted)


def test_weights_that_require_grad_stream_as_well():
    """Multi-head attention takes another kernel when its weights require grad; streamed ones do not."""
    model, x = build("multi-head attention"), inputs()
    wanted = model(x)
    attach_small(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), wanted)


def inference(inside):
    """`torch.inference_mode(False)` would switch autograd on."""
    return torch.inference_mode() if inside else torch.no_grad()


INSIDE_OR_OUTSIDE = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize(("attach_inside", "run_inside", "detach_inside"), INSIDE_OR_OUTSIDE)
@pytest.mark.parametrize("name", ["buffers", "tables around children", "parametrized weights"])
@torch.no_grad()
def test_a_model_that_was_loaded_in_inference_mode_streams_and_is_usable_after(
    name, attach_inside, run_inside, detach_inside
):
    """ComfyUI loads models in inference mode, so their weights are inference tensors."""
    with torch.inference_mode():
        model, x = build(name), inputs()
        wanted = outputs(model, [{}] * 3, x)
    with inference(attach_inside):
        swap = attach_small(model)
    with inference(run_inside):
        assert equal(outputs(model, [{}] * 3, x), wanted)
    with inference(detach_inside):
        swap.detach()
    for inside in (True, False):
        with inference(inside):
            assert torch.equal(model(x), wanted[0])
            assert all(torch.equal(weight[...], weight) for weight in model.state_dict().values())


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_the_input_is_right_or_refused_but_never_wrong(mode):
    model, x = build("blocks in a list").requires_grad_(False), inputs().requires_grad_()
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    attach_small(model, mode, max_vram=limit_called("smallest", model, mode=mode, block_size=SMALL))
    for _ in range(3):
        try:
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
        except RuntimeError as refusal:
            assert "modified by an inplace operation" in str(refusal)  # noqa: PT017
        else:
            assert torch.equal(gradient, wanted)


def test_parameters_still_require_grad_after_detaching_and_can_be_trained():
    model, x = build("blocks in a list"), inputs()
    model.blocks[1].qkv.requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    swap = attach_small(model)
    model(x)
    swap.detach()
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wanted
    model(x).sum().backward()
    assert all((weight.grad is not None) == wanted[name] for name, weight in model.named_parameters())


# -- while attached ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["tied weights", "buffers", "strides on purpose"])
@torch.no_grad()
def test_between_forwards_the_state_dict_is_the_original(name, limit, mode):
    model, x = build(name), inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach_small(model, mode, max_vram=limit_called(limit, model, mode=mode, block_size=SMALL))
    for _ in range(4):
        assert list(model.state_dict()) == list(before)
        assert same_contents(model.state_dict(), before)
        model(x)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_moving_the_model_while_attached_moves_nothing(mode):
    model, x = build("multi-head attention"), inputs()
    wanted, weights = model(x), contents(model)
    swap = attach_small(model, mode)
    for move in (lambda: model.to(torch.float64), model.half, lambda: model.blocks[1].to("meta"), model.double):
        move()
        assert same_contents(contents(model), weights)
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert same_contents(contents(model), weights)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_block_can_be_called_alone_while_attached(mode):
    model, x = build("blocks in a list"), inputs()
    wanted, whole = [block(x) for block in model.blocks], model(x)
    attach_small(model, mode, max_vram=limit_called("smallest", model, mode=mode, block_size=SMALL))
    for _ in range(3):
        assert equal(
            [model.blocks[index](x) for index in (3, 0, 4, 1, 2)], [wanted[index] for index in (3, 0, 4, 1, 2)]
        )
        assert torch.equal(model.blocks[2].qkv(x), model.blocks[2].qkv(x))
        assert torch.equal(model(x), whole)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_inputs_may_grow_and_shrink_from_forward_to_forward(mode):
    model = build("blocks in a list")
    sizes = (1, 1, 4, 4, 4, 2, 9, 1, 9)
    wanted = [model(inputs(batch=size)) for size in sizes]
    attach_small(model, mode, max_vram=limit_called("half of the weights", model, mode=mode, block_size=SMALL))
    assert equal([model(inputs(batch=size)) for size in sizes], wanted)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_blocks_that_compute_in_several_threads_at_once_do_not_disturb_each_other(mode):
    class Parallel(Transformer):
        def forward(self, x):
            with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return torch.stack(list(pool.map(lambda block: block(x), [*self.blocks] * 3))).sum(0)

    torch.manual_seed(3)
    model, x = Parallel().eval(), inputs()
    with torch.no_grad():
        wanted = torch.stack([block(x) for block in [*model.blocks] * 3]).sum(0)
    attach_small(model, mode, max_vram=limit_called("smallest", model, mode=mode, block_size=SMALL))
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_the_users_own_hooks_and_forwards_stay_and_are_called():
    model, x, calls = build("blocks in a list"), inputs(), []
    model.blocks[0].qkv.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    original = model.blocks[1].forward
    model.blocks[1].forward = lambda x: calls.append("own") or original(x)
    linear = model.blocks[2].ffn[0].forward
    model.blocks[2].ffn[0].forward = lambda x: calls.append("leaf") or linear(x)
    wanted, before = model(x), fingerprint(model)
    own = model.blocks[1].__dict__["forward"]
    calls.clear()
    swap = attach_small(model)
    assert torch.equal(model(x), wanted)
    assert calls == ["before", "own", "leaf"]
    swap.detach()
    assert model.blocks[1].__dict__["forward"] is own
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)
    assert calls == ["before", "own", "leaf"] * 2


@torch.no_grad()
def test_a_root_that_was_given_a_forward_of_its_own_gets_it_back():
    model, x = build("blocks in a list"), inputs()
    original = model.forward
    model.forward = own = lambda x: original(x) + 1
    wanted = model(x)
    swap = attach_small(model)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert model.forward is own


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_large_weight_streams_although_its_module_has_children_without_weights(mode):
    """As mixtures of experts have it: all experts in one parameter, beside an activation module."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.activation = nn.SiLU()

        def forward(self, x):
            return x + self.activation(x @ self.table)

    model, x = Transformer(Experts).eval(), inputs()
    wanted = model(x)
    swap = attach_small(model, mode)
    assert torch.equal(model(x), wanted)
    packed = {entry.entry.path for layer in swap.packed.layers for entry in layer.entries}
    assert {f"blocks.{number}.table" for number in range(5)} <= packed


@torch.no_grad()
def test_only_the_blocks_that_were_named_stream():
    model, x = build("a list between the blocks"), inputs()
    wanted = model(x)
    swap = attach_small(model, block_names=("vace_blocks",))
    assert torch.equal(model(x), wanted)
    assert {layer.layer.path.split(".")[0] for layer in swap.packed.layers} == {"vace_blocks"}


@pytest.mark.parametrize("streamed_blocks", range(7))
@torch.no_grad()
def test_as_many_blocks_stream_as_were_asked_for(streamed_blocks):
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    swap = attach_small(model, mode="chunkwise", streamed_blocks=streamed_blocks)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
        assert streaming_blocks(swap) == min(streamed_blocks, 5)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_smaller_than_the_unit_size_are_counted_as_blocks_all_the_same(mode):
    model = build("blocks in a list")
    swap = attach_small(model, mode, block_size=300 * MIB, streamed_blocks=2)
    assert streaming_blocks(swap) == 2


def streaming_blocks(swap):
    """How many blocks have a weight that is streamed."""
    units = [swap.plan.units[index] for index in swap.plan.streamed]
    return len({swap.packed.sizes[layer].block for unit in units for layer in range(unit.first, unit.last)} - {None})


# -- giving memory back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@torch.no_grad()
def test_memory_that_is_asked_for_between_forwards_is_given_back(mode, share):
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    swap = attach_small(model, mode)
    for _ in range(3):
        model(x)
    assert swap.plan.streamed == ()
    before, asked = swap.device_bytes, int(weight_bytes(model) * share)
    swap.evict(asked)
    assert before - swap.device_bytes >= min(asked, before - swap.rest_bytes - 2 * swap.plan.slot_bytes)
    for _ in range(3):
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("asked", [1, 30_000, 1 << 40])
@torch.no_grad()
def test_memory_that_is_asked_for_in_the_middle_of_a_forward_disturbs_nothing(asked, caplog):
    """A host frees memory when something else, a ControlNet say, is loaded while the model computes."""
    asking = []

    class Asking(nn.Linear):
        def forward(self, x):
            for swap in asking:
                swap.evict(asked)
            return super().forward(x)

    model, x = build("blocks in a list"), inputs()
    model.blocks[2].out.__class__ = Asking
    wanted = model(x)
    swap = attach_small(model)
    model(x)
    model(x)
    assert swap.plan.streamed == ()
    asking.append(swap)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    asking.clear()
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    assert all(unit.active == 0 for unit in swap.streamer.units)
    assert swap.telemetry.last().misses == 0
    assert not [record for record in caplog.records if "slots are in use" in record.message]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["in a layer", "between layers"])
@torch.no_grad()
def test_detaching_in_the_middle_of_a_forward_is_refused_or_leaves_the_model_whole(mode, where):
    detaching = []

    class Detaching(nn.Linear):
        def forward(self, x):
            for swap in detaching:
                swap.detach()
            return super().forward(x)

    model, x = build("blocks in a list"), inputs()
    if where == "in a layer":
        model.blocks[2].out.__class__ = Detaching
    wanted, before = model(x), fingerprint(model)
    swap = attach_small(model, mode)
    if where == "between layers":
        model.blocks[2].out.register_forward_hook(lambda *_: ([swap.detach() for swap in detaching], None)[1])
    detaching.append(swap)
    try:
        result = model(x)
    except RuntimeError:
        assert swap.attached
    else:
        assert torch.equal(result, wanted)
    detaching.clear()
    swap.detach()
    assert torch.equal(model(x), wanted)
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["adaptive", "layerwise"])
@torch.no_grad()
def test_all_device_memory_is_released_by_detaching(mode, monkeypatch):
    made = []
    empty = Link.empty

    def counted(link, nbytes):
        buffer = empty(link, nbytes)
        made.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    monkeypatch.setattr(Link, "empty", counted)
    model, x = build("tables around children"), inputs()
    swap = attach_small(model, mode, max_vram=limit_called("half of the weights", model, mode=mode, block_size=SMALL))
    for _ in range(3):
        model(x)
    swap.detach()
    gc.collect()
    assert made
    assert [storage for storage in made if storage() is not None] == []
    assert swap.device_bytes == 0


@torch.no_grad()
def test_ram_does_not_grow_with_every_run():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(6))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x, process = Wide(), torch.randn(1, 1024), psutil.Process()

    def run():
        swap = attach(model, SwapConfig(block_size=5 * MIB, max_vram=20 * MIB), "cpu")
        model(x)
        model(x)
        swap.detach()

    run()
    before = process.memory_info().rss
    for _ in range(8):
        run()
    assert process.memory_info().rss - before < weight_bytes(model)


@torch.no_grad()
def test_a_model_that_was_attached_and_detached_is_gone_with_its_weights_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = build("blocks in a list")
        swap = attach_small(model)
        model(inputs())
        packed = swap.detach()
        alive = [weakref.ref(model), weakref.ref(packed), weakref.ref(swap), weakref.ref(model.blocks[0].qkv.weight)]
        del model, swap, packed
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


@torch.no_grad()
def test_a_swap_that_nobody_holds_goes_on_as_long_as_the_model_does():
    model = build("blocks in a list")
    wanted = model(inputs())
    alive = weakref.ref(attach_small(model))
    gc.collect()
    assert torch.equal(model(inputs()), wanted)
    assert alive().attached
    del model
    gc.collect()
    assert alive() is None


# -- again and again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.product(MODES, repeat=2)))
@torch.no_grad()
def test_a_model_can_be_attached_again_in_another_mode_with_what_was_packed(first, second):
    model, x = build("a list between the blocks"), inputs()
    wanted, before = model(x), fingerprint(model)
    swap = attach_small(model, first)
    model(x)
    packed = swap.detach()
    swap = attach(model, SwapConfig(mode=second, block_size=3 * SMALL), "cpu", packed=packed)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_attaching_many_times_nests_nothing():
    depths = []

    class Deep(Block):
        def forward(self, x):
            frame, depth = sys._getframe(), 0
            while frame is not None:
                frame, depth = frame.f_back, depth + 1
            depths.append(depth)
            return super().forward(x)

    model, x = Transformer(Deep, 2).eval(), inputs()
    model(x)
    for _ in range(20):
        swap = attach_small(model)
        model(x)
        swap.detach()
    model(x)
    assert depths[-1] == depths[1]
    assert len(set(depths[2:-2])) == 1


@torch.no_grad()
def test_weights_that_the_user_changes_between_two_attachments_are_what_streams():
    model, x = build("blocks in a list"), inputs()
    packed = attach_small(model).detach()
    model.blocks[0].out.weight.zero_()
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    wanted = model(x)
    attach(model, SwapConfig(block_size=SMALL), "cpu", packed=packed)
    assert torch.equal(model(x), wanted)


CHANGES = {
    "converted": lambda model: model.to(torch.float64),
    "given other data": lambda model: setattr(model.blocks[0].out.weight, "data", torch.zeros(WIDTH, WIDTH)),
    "given another parameter": lambda model: setattr(
        model.blocks[0].out, "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH))
    ),
    "given another layer": lambda model: setattr(model.blocks[0], "out", nn.Linear(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_model_that_was_changed_since_it_was_packed_streams_as_it_is_now(change):
    model, x = build("blocks in a list"), inputs()
    packed = attach_small(model).detach()
    CHANGES[change](model)
    x = x.to(model.head.weight.dtype)
    wanted, before = model(x), fingerprint(model)
    swap = attach(model, SwapConfig(block_size=SMALL), "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    assert {id(layer.layer.module) for layer in swap.packed.layers} <= set(map(id, model.modules()))
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_tensors_that_share_memory_still_do_after_detaching():
    model, x = build("blocks in a list"), inputs()
    fused = torch.randn(2 * WIDTH, WIDTH)
    model.blocks[0].out.weight = nn.Parameter(fused[:WIDTH])
    model.blocks[1].out.weight = nn.Parameter(fused[WIDTH:])
    model.blocks[2].out.weight = nn.Parameter(model.blocks[3].out.weight.data)
    wanted = model(x)
    swap = attach_small(model)
    assert torch.equal(model(x), wanted)
    swap.detach()
    model.blocks[2].out.weight.zero_()
    assert not model.blocks[3].out.weight.any()
