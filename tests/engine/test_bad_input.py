"""Wrong settings are refused in words; whatever breaks off leaves the model whole and the engine ready to go on."""

import threading

import pytest
import torch
from intelligent_vram.vram import LimitTooSmall, NoBlocks, Patches, SwapConfig, attach
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.units import GIB, MIB, format_bytes
from torch import nn

from .models import (
    CASES,
    WIDTH,
    Block,
    Transformer,
    build,
    contents,
    fingerprint,
    inputs,
    outputs,
    smallest_limit,
    wanted_outputs,
    weight_bytes,
)
from .subclasses import Opaque

SMALL = 9000


def attach_small(model, mode="adaptive", **settings):
    return attach(model, SwapConfig(mode=mode, **{"block_size": SMALL, **settings}), "cpu")


def is_whole(model, before, weights, x, wanted, **call):
    """The model is the one that came in, and computes as it did."""
    now = contents(model)
    return (
        fingerprint(model) == before
        and all(torch.equal(now[name], weights[name]) for name in weights)
        and torch.equal(model(x, **call), wanted)
    )


def engine_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("intelligent-vram")]


# -- settings ----------------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
HUGE = pytest.param(10**400, id="10**400")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, -1, -0.5, True, False, "12", "", None, [16], 1e300, HUGE])
def test_a_senseless_max_vram_gb_is_refused_by_name(value):
    with pytest.raises(ValueError, match="max_vram"):
        SwapConfig.from_user(value, 300, "adaptive", 0)


@pytest.mark.parametrize("value", [NAN, INFINITY, -1, 0, 0.0, True, "300", None, 1e300, HUGE])
def test_a_senseless_block_size_mb_is_refused_by_name(value):
    with pytest.raises(ValueError, match="block_size"):
        SwapConfig.from_user(16, value, "adaptive", 0)


@pytest.mark.parametrize("value", [NAN, -1, 0.5, True, "3", HUGE])
def test_a_senseless_empty_cache_freq_is_refused_by_name(value):
    with pytest.raises(ValueError, match="empty_cache_freq"):
        SwapConfig.from_user(16, 300, "adaptive", value)


@pytest.mark.parametrize("value", ["Adaptive", "", "fast", None, 3, ["adaptive"]])
def test_an_unknown_mode_is_refused_with_the_known_ones(value):
    with pytest.raises(ValueError, match=r"swap_mode is .*adaptive, chunkwise, layerwise"):
        SwapConfig.from_user(16, 300, value, 0)
    with pytest.raises(ValueError, match=r"swap_mode is .*adaptive, chunkwise, layerwise"):
        SwapConfig(mode=value)


SENSELESS = {
    "max_vram": (0, -1, 1.5, NAN, True, "1", 1 << 60),
    "block_size": (0, -1, 1.5, NAN, True, "1", 1 << 60, None),
    "streamed_blocks": (-1, 1.5, True, "1", 1 << 40),
    "slots": (0, 1, -2, 2.0, True, "2", 1000),
    "host_budget": (-1, 0.5, True, "1", 1 << 60),
    "block_names": ("blocks", 3, (1, 2), ()),
    "offload_device": (1, True, "gpu", "cuda", "cuda:-1", "cuda:1000", "", ("cuda:1",)),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SENSELESS.items() for value in values])
def test_senseless_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SwapConfig(**{name: value})


@pytest.mark.parametrize("gigabytes", [1e-9, 0.1, 7, 7.5, 80, 1000])
def test_gigabytes_and_megabytes_become_bytes(gigabytes):
    config = SwapConfig.from_user(gigabytes, 0.5, "layerwise", 3, slots=4)
    assert config == SwapConfig(round(gigabytes * GIB), MIB // 2, "layerwise", 3, slots=4)


def test_zero_gigabytes_is_automatic():
    assert SwapConfig.from_user(0, 300, "adaptive", 0).max_vram is None
    assert SwapConfig.from_user(0.0, 300, "adaptive", 0) == SwapConfig()


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adaptive", "layerwise"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_limit_that_is_too_small_names_the_smallest_that_does(name, mode):
    model, x = build(name), inputs()
    before, weights = fingerprint(model), contents(model)
    needed = smallest_limit(model, mode=mode, block_size=SMALL)
    with pytest.raises(LimitTooSmall) as refusal:
        attach_small(model, mode, max_vram=needed - 1)
    assert refusal.value.needed == needed
    assert format_bytes(needed) in str(refusal.value)
    assert is_whole(model, before, weights, x, wanted_outputs(name)[0], **CASES[name].calls[0])

    attach_small(model, mode, max_vram=needed)
    for result, wanted in zip(outputs(model, CASES[name].calls, x), wanted_outputs(name), strict=True):
        assert torch.equal(result, wanted)


NESTED = "tables around children"
EXTRA = [*((name, 0) for name in CASES), *((NESTED, extra) for extra in (1, 30_000, 100_000))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "extra"), EXTRA)
@torch.no_grad()
def test_weights_on_the_device_never_exceed_the_limit(name, extra, mode):
    model, x = build(name), inputs()
    limit = smallest_limit(model, mode=mode, block_size=SMALL) + extra
    swap = attach_small(model, mode, max_vram=limit)
    assert swap.device_bytes <= limit
    outputs(model, CASES[name].calls, x)
    assert max(record.peak_bytes for record in swap.telemetry.records()) <= limit


@torch.no_grad()
def test_a_limit_that_does_not_hold_what_lies_beside_the_blocks_is_refused():
    model = build("blocks in a list")
    beside = weight_bytes(model.embed) + weight_bytes(model.head)
    with pytest.raises(LimitTooSmall, match=r"beside the blocks"):
        attach_small(model, max_vram=beside)


@torch.no_grad()
def test_a_limit_too_small_for_the_blocks_that_shall_be_resident_is_refused():
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    with pytest.raises(LimitTooSmall) as refusal:
        attach_small(model, streamed_blocks=1, max_vram=100_000)
    attach_small(model, streamed_blocks=1, max_vram=refusal.value.needed)
    assert torch.equal(model(x), wanted)


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_without_blocks_is_refused_with_what_was_looked_for():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        NoBlocks, match=r"Sequential has no list of blocks named blocks, .*double_blocks.* no module list"
    ):
        attach_small(model)


def test_a_model_whose_lists_have_other_names_is_told_them():
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.stages = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(NoBlocks, match=r"its module lists are inner\.stages"):
        attach_small(model)
    with pytest.raises(NoBlocks, match=r"named levels"):
        attach_small(model, block_names=("levels",))
    attach_small(model, block_names=("inner.stages",)).detach()
    attach_small(model, block_names=("stages",)).detach()


def test_an_empty_list_of_blocks_is_no_list_of_blocks():
    model = nn.Module()
    model.blocks = nn.ModuleList()
    with pytest.raises(NoBlocks):
        attach_small(model)


@pytest.mark.parametrize("mode", MODES)
def test_weights_on_the_meta_device_are_refused_by_name_and_number(mode):
    model = build("blocks in a list")
    model.blocks[1].ffn.to("meta")
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"4 parameters of Transformer are on the meta device.*blocks\.1\.ffn\.0\.weight"
    ):
        attach_small(model, mode)
    assert fingerprint(model) == before


class Without(nn.Module):
    """Blocks without weights, with weights of no elements, and with a weight that nothing can pack."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        for block in self.blocks:
            if kind == "empty":
                block.nothing = nn.Parameter(torch.empty(0, 3))
            if kind == "sparse":
                block.register_buffer("table", torch.eye(WIDTH).to_sparse())
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + (0 if getattr(block, "table", None) is None else (block.table @ x[0].t()).t())
        return self.head(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["nothing", "empty", "sparse"])
@torch.no_grad()
def test_blocks_without_weights_and_weights_that_cannot_be_packed_do_no_harm(kind, mode):
    model, x = Without(kind), inputs()
    wanted, before = model(x), fingerprint(model)
    swap = attach_small(model, mode)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_a_weight_that_cannot_be_packed_is_named_once(caplog):
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    model.blocks[1].out.weight = nn.Parameter(Opaque(model.blocks[1].out.weight.detach()), requires_grad=False)
    attach_small(model)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    named = [record.getMessage() for record in caplog.records if "blocks.1.out.weight" in record.getMessage()]
    assert len(named) == 1
    assert "cannot be packed" in named[0]


# -- exceptions in a forward -------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As a host's own interruption, which `except Exception` does not see."""


class Breaking(nn.Linear):
    """Raises what it was told to, once it has computed or before."""

    def forward(self, x):
        error = self.__dict__.get("error")
        if error is not None:
            raise error
        return super().forward(x)


def breakable():
    torch.manual_seed(7)
    model = Transformer().eval()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Breaking
    return model, [module for block in model.blocks for module in block.modules() if isinstance(module, Breaking)]


ERRORS = (ValueError("stop"), KeyboardInterrupt(), Interrupted(), torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_after_an_exception_in_any_layer_the_next_forward_is_right(mode):
    model, layers = breakable()
    x = inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    limit = smallest_limit(model, mode=mode, block_size=SMALL) + weight_bytes(model) // 2
    swap = attach_small(model, mode, max_vram=limit)
    for number, layer in enumerate(layers):
        layer.__dict__["error"] = error = ERRORS[(number + number // 4) % 4]
        with pytest.raises(type(error)):
            model(x)
        del layer.__dict__["error"]
        assert all(unit.active == 0 for unit in swap.streamer.units)
        assert torch.equal(model(x), wanted)
        assert swap.device_bytes <= limit
    swap.detach()
    assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forward", range(4))
@torch.no_grad()
def test_after_an_exception_in_an_early_forward_the_model_can_be_detached(forward, mode):
    model, layers = breakable()
    x = inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    swap = attach_small(model, mode)
    for _ in range(forward):
        model(x)
    layers[9].__dict__["error"] = Interrupted()
    with pytest.raises(Interrupted):
        model(x)
    del layers[9].__dict__["error"]
    swap.detach()
    assert is_whole(model, before, weights, x, wanted)
    assert engine_threads() == []


@torch.no_grad()
def test_running_out_of_memory_is_explained_with_the_limit_and_a_way_out():
    model, layers = breakable()
    attach_small(model, max_vram=10 * MIB)
    layers[3].__dict__["error"] = torch.OutOfMemoryError("Tried to allocate 3 GiB")
    with pytest.raises(torch.OutOfMemoryError, match=r"limit of 10\.0 MiB.*max_vram_gb.*Tried to allocate 3 GiB"):
        model(inputs())


@torch.no_grad()
def test_an_exception_before_the_first_block_and_in_the_root_do_no_harm():
    class Picky(Transformer):
        def forward(self, x, bad=False):
            x = super().forward(x)
            if bad:
                raise ValueError("bad")
            return x

    torch.manual_seed(1)
    model, x = Picky().eval(), inputs()
    wanted = model(x)
    attach_small(model)
    for _ in range(3):
        with pytest.raises(ValueError, match="bad"):
            model(x, bad=True)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3))
        with pytest.raises(TypeError):
            model(x, unknown=1)
        assert torch.equal(model(x), wanted)


# -- exceptions while attaching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError("cancelled"), KeyboardInterrupt(), Interrupted()])
@torch.no_grad()
def test_breaking_off_while_packing_leaves_the_model_whole_and_attaching_works_after(error, call, mode):
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if len(calls) == call:
            raise error

    with pytest.raises(type(error)):
        attach(model, SwapConfig(mode=mode, block_size=SMALL), "cpu", progress=progress)
    assert len(calls) == call
    assert is_whole(model, before, weights, x, wanted)
    assert engine_threads() == []
    swap = attach_small(model, mode)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_progress_goes_up_to_all_of_the_weights(mode):
    model, calls = build("blocks in a list"), []
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL), "cpu", progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {swap.packed.packed_bytes}
    assert calls[-1][0] == calls[-1][1]


@torch.no_grad()
def test_a_patch_that_fails_leaves_the_model_whole():
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)

    def fail(path, tensor):
        raise RuntimeError(f"no patch for {path}")

    for path in ("blocks.3.qkv.weight", "embed.weight"):
        patches = Patches(lambda name, path=path: 1 if name == path else None, fail)
        with pytest.raises(RuntimeError, match=f"no patch for {path}"):
            attach(model, SwapConfig(block_size=SMALL), "cpu", patches=patches)
        assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize(
    "broken",
    [lambda tensor: tensor[:1], lambda tensor: tensor.double(), lambda tensor: tensor.reshape(-1)],
    ids=["shape", "dtype", "dimensions"],
)
@pytest.mark.parametrize("path", ["blocks.3.qkv.weight", "embed.weight"])
@torch.no_grad()
def test_a_patch_that_changes_shape_or_dtype_is_refused_by_name(path, broken):
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    patches = Patches(lambda name: 1 if name == path else None, lambda _, tensor: broken(tensor))
    with pytest.raises(ValueError, match=f"patched weight {path}"):
        attach(model, SwapConfig(block_size=SMALL), "cpu", patches=patches)
    assert is_whole(model, before, weights, x, wanted)


class FailingAllocations:
    """From the ``first`` allocation of device memory on, ``count`` fail."""

    def __init__(self, monkeypatch, first, count=1):
        self.calls = 0
        empty = Link.empty

        def failing(link, nbytes):
            self.calls += 1
            if first <= self.calls < first + count:
                raise torch.OutOfMemoryError("no room")
            return empty(link, nbytes)

        monkeypatch.setattr(Link, "empty", failing)


@pytest.mark.parametrize("settings", [{}, {"mode": "chunkwise", "streamed_blocks": 2}, {"streamed_blocks": 0}])
@torch.no_grad()
def test_an_allocation_that_fails_while_attaching_is_lived_with(settings, monkeypatch):
    model, x = build("tables around children"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    counted = FailingAllocations(monkeypatch, first=1 << 30)
    attach_small(model, **settings).detach()
    assert counted.calls > 1
    for number in range(1, counted.calls + 1):
        for count in (1, 2):
            with monkeypatch.context() as patch:
                FailingAllocations(patch, number, count)
                swap = attach_small(model, **settings)
            assert torch.equal(model(x), wanted)
            swap.detach()
            assert is_whole(model, before, weights, x, wanted)


@torch.no_grad()
def test_where_nothing_can_be_allocated_the_forward_says_so_and_the_model_is_whole(monkeypatch):
    model, x = build("tables around children"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    with monkeypatch.context() as patch:
        FailingAllocations(patch, 1, 1 << 30)
        swap = attach_small(model)
        with pytest.raises(torch.OutOfMemoryError, match="max_vram_gb"):
            model(x)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_allocations_that_fail_in_forwards_raise_or_are_lived_with_and_then_all_is_well(count, mode):
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    for first in (1, 3, 20):
        swap = attach_small(model, mode)
        with pytest.MonkeyPatch.context() as patch:
            FailingAllocations(patch, first, count)
            for _ in range(3):
                try:
                    result = model(x)
                except torch.OutOfMemoryError:
                    assert all(unit.active == 0 for unit in swap.streamer.units)
                    continue
                assert torch.equal(result, wanted)
        for _ in range(3):
            assert torch.equal(model(x), wanted)
        assert swap.device_bytes <= swap.rest_bytes + max(swap.plan.device_bytes, swap.streamer.peak_bytes)
        swap.detach()
        assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@pytest.mark.parametrize("first", range(1, 8))
@torch.no_grad()
def test_when_a_better_plan_does_not_fit_after_all_the_plan_that_is_kept_is_really_there(first, mode):
    """The second forward takes over the plan that the first one measured for; another program took the memory."""
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    swap = attach_small(model, mode)
    model(x)
    with pytest.MonkeyPatch.context() as patch:
        FailingAllocations(patch, first)
        assert torch.equal(model(x), wanted)
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    assert swap.telemetry.last().misses == 0
    assert swap.streamer.device_bytes == swap.plan.device_bytes


# -- unusual calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_two_threads_that_call_the_model_at_once_both_get_it_right(mode):
    model = build("blocks in a list")
    given = [inputs(batch=batch) for batch in (1, 2, 3, 4)]
    wanted = [model(x) for x in given]
    attach_small(model, mode, max_vram=smallest_limit(model, mode=mode, block_size=SMALL))
    failures = []
    start = threading.Barrier(4)

    def work(number):
        torch.set_num_threads(1)  # a setting of the thread's own, and kernels differ in the last bit
        with torch.no_grad():
            start.wait()
            for _ in range(6):
                if not torch.equal(model(given[number]), wanted[number]):
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_model_that_calls_itself_gets_it_right(mode):
    class Again(Block):
        def forward(self, x):
            x = super().forward(x)
            if self.__dict__.get("root") and x.shape[0] > 1:
                x = x + self.root(x[:1])
            return x

    torch.manual_seed(2)
    model, x = Transformer(Again).eval(), inputs()
    model.blocks[2].__dict__["root"] = model
    wanted = model(x)
    swap = attach_small(model, mode, max_vram=smallest_limit(model, mode=mode, block_size=SMALL))
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    assert all(unit.active == 0 for unit in swap.streamer.units)
    swap.detach()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("order", ["first one first", "last one first"])
@torch.no_grad()
def test_attaching_twice_is_refused_or_works_in_any_order_of_detaching(order):
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    first = attach_small(model)
    model(x)
    try:
        second = attach_small(model)
    except (ValueError, RuntimeError) as refusal:
        assert "attached" in str(refusal)  # noqa: PT017
        swaps = [first]
    else:
        swaps = [first, second] if order == "first one first" else [second, first]
    assert torch.equal(model(x), wanted)
    for swap in swaps:
        swap.detach()
        assert torch.equal(model(x), wanted)
    assert is_whole(model, before, weights, x, wanted)


@torch.no_grad()
def test_detaching_twice_does_nothing_the_second_time():
    model, x = build("blocks in a list"), inputs()
    wanted, before, weights = model(x), fingerprint(model), contents(model)
    swap = attach_small(model)
    assert swap.attached
    assert swap.detach() is not None
    assert not swap.attached
    model.blocks[0].forward = own = model.blocks[0].forward
    assert swap.detach() is None
    assert model.blocks[0].__dict__.pop("forward") is own
    assert is_whole(model, before, weights, x, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host_budget", [None, 0])
@torch.no_grad()
def test_no_thread_is_left_behind(host_budget, mode):
    model, x = build("blocks in a list"), inputs()
    swap = attach_small(model, mode, host_budget=host_budget)
    for _ in range(3):
        model(x)
    swap.detach()
    assert engine_threads() == []


@torch.no_grad()
def test_evicting_from_and_describing_a_detached_model_do_no_harm():
    model, x = build("blocks in a list"), inputs()
    wanted = model(x)
    swap = attach_small(model)
    model(x)
    swap.detach()
    assert swap.evict(1 << 30) == 0
    assert swap.device_bytes == 0
    assert torch.equal(model(x), wanted)
