"""When memory runs out in a forward, the engine takes less of it and the forward is repeated, with the same result."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach, limit
from intelligent_vram.vram.adapt import CALM, REGROW_AFTER
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.repeat import Call, out_of_memory
from torch import nn

from .models import Transformer, build, contents, fingerprint, inputs, smallest_limit, weight_bytes

SMALL = 9000
BLOCKS = 5


def oom():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has nothing left.")


class Failing:
    """Raises in a chosen block at chosen calls of it."""

    def __init__(self, block, *at, error=oom):
        self.at, self.error, self.calls = set(at), error, 0
        block.norm.register_forward_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.error()


def attached(model, mode="adaptive", **settings):
    return attach(model, SwapConfig(mode=mode, **{"block_size": SMALL, **settings}), "cpu")


@pytest.fixture
def model():
    return build("blocks in a list")


@pytest.fixture
def wanted(model):
    with torch.no_grad():
        return model(inputs())


@pytest.mark.parametrize("block", [0, 2, 4])
@pytest.mark.parametrize("forward", [0, 1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_forward_in_which_memory_runs_out_gives_the_same_result(model, wanted, mode, forward, block):
    before, weights = fingerprint(model), contents(model)
    swap = attached(model, mode, max_vram=smallest_limit(model, mode=mode, block_size=SMALL) + weight_bytes(model) // 2)
    failing = Failing(model.blocks[block], forward)
    for number in range(6):
        if mode == "layerwise" and number == 0 == forward:
            with pytest.raises(torch.OutOfMemoryError):  # nothing was copied ahead: there is nothing smaller
                model(inputs())
            continue
        assert torch.equal(model(inputs()), wanted), f"forward {number}"
    repeated = 0 if mode == "layerwise" and forward == 0 else 1
    assert (failing.calls, swap.repeated) == (6 + repeated, repeated)
    swap.detach()
    now = contents(model)
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    for block in model.blocks:
        block.norm._forward_hooks.clear()
    assert fingerprint(model) == before


@torch.no_grad()
def test_resident_units_are_given_back_first_and_come_back_afterwards(model, wanted):
    swap = attached(model)
    for _ in range(3):
        model(inputs())
    resident = swap.plan.resident_bytes
    assert resident
    seen = []
    failing = Failing(model.blocks[3], 0)
    model.blocks[4].norm.register_forward_hook(lambda *_: seen.append(swap.plan.resident_bytes))
    assert torch.equal(model(inputs()), wanted)
    assert (failing.calls, seen) == (2, [0])
    for _ in range(3):
        assert torch.equal(model(inputs()), wanted)
    assert swap.plan.resident_bytes == resident, "the CPU's limit has room for all"
    assert swap.telemetry.last(wait=True).repeats == 0
    assert [record.repeats for record in swap.telemetry.records()][3] == 1


@torch.no_grad()
def test_it_goes_down_to_single_layers_before_it_gives_up(model, wanted):
    swap = attached(model)
    model(inputs())
    model(inputs())
    plans = []
    failing = Failing(model.blocks[2], *range(100))
    model.blocks[0].norm.register_forward_hook(lambda *_: plans.append(swap.plan))
    with pytest.raises(torch.OutOfMemoryError, match=r"repeated \d+ times with smaller plans.*Raise max_vram_gb"):
        model(inputs())
    sizes = [plan.device_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True), "each plan takes less than the one before"
    assert len(set(sizes)) == len(sizes) or plans[-1].slots == 0
    assert plans[0].resident
    assert not plans[-1].resident
    assert plans[-1].slots == 0
    assert max(len(plan.units) for plan in plans) == len(plans[-1].units)
    failing.at.clear()
    for _ in range(4):
        assert torch.equal(model(inputs()), wanted)
    assert swap.plan.resident, "units are resident again once forwards succeed"


@torch.no_grad()
def test_a_number_of_blocks_that_the_user_chose_is_tried_again_after_a_while(model, wanted):
    swap = attached(model, "chunkwise", streamed_blocks=2)
    model(inputs())
    asked = swap.plan
    Failing(model.blocks[1], 0)
    assert torch.equal(model(inputs()), wanted)
    assert not swap.plan.resident
    for _ in range(REGROW_AFTER + 1):
        assert torch.equal(model(inputs()), wanted)
    assert swap.plan == asked
    Failing(model.blocks[1], 0)
    model(inputs())
    for _ in range(REGROW_AFTER + 1):
        model(inputs())
    assert swap.plan != asked, "the second time it waits longer"
    for _ in range(REGROW_AFTER):
        model(inputs())
    assert swap.plan == asked


@torch.no_grad()
def test_caution_after_a_failure_is_given_up_again(model, wanted):
    swap = attached(model)
    for _ in range(3):
        model(inputs())
    Failing(model.blocks[3], 0)
    model(inputs())
    assert swap.adapter._caution
    for _ in range(2 * CALM + 4):
        assert torch.equal(model(inputs()), wanted)
    assert not swap.adapter._caution


@pytest.mark.parametrize(
    "error",
    [
        oom,
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: RuntimeError("CUDA out of memory"),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
@torch.no_grad()
def test_every_library_s_way_to_say_it_is_understood(model, wanted, error):
    attached(model)
    model(inputs())
    failing = Failing(model.blocks[3], 0, error=error)
    assert torch.equal(model(inputs()), wanted)
    assert failing.calls == 2


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), RuntimeError("CUDA error: device-side assert")]
)
@torch.no_grad()
def test_what_is_not_want_of_memory_is_not_repeated(model, wanted, error):
    swap = attached(model)
    model(inputs())
    failing = Failing(model.blocks[3], 0, error=lambda: error)
    with pytest.raises(type(error)) as raised:
        model(inputs())
    assert raised.value is error
    assert (failing.calls, swap.repeated) == (1, 0)
    assert not out_of_memory(error)
    assert torch.equal(model(inputs()), wanted)


@torch.no_grad()
def test_memory_that_runs_out_while_a_plan_is_taken_over_is_answered_too(model, wanted, monkeypatch):
    swap = attached(model)
    model(inputs())
    real, calls = swap.link.empty, []

    def empty(nbytes):
        calls.append(nbytes)
        if len(calls) in (2, 3):
            raise oom()
        return real(nbytes)

    monkeypatch.setattr(swap.link, "empty", empty)
    for _ in range(4):
        assert torch.equal(model(inputs()), wanted)
    assert len(calls) > 3


# -- what the forward was called with --------------------------------------------------------------------------------


class Stateful(Transformer):
    """Takes from a list that it is given, counts on itself and in an object, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.cache = {"seen": []}
        self.tracker = type("Tracker", (), {})()
        self.tracker.states = {}

    def forward(self, x, control=None, options=None):
        self.count += 1
        self.cache["seen"].append(self.count)
        self.tracker.states[self.count] = [self.count]
        self.tracker.last = self.count
        x = self.embed(x) + torch.rand(())
        for block in self.blocks:
            x = block(x) + control["middle"].pop()
            options.setdefault("indices", []).append(len(control["middle"]))
        return self.head(x)


def control():
    return {"middle": [torch.full((), float(number)) for number in range(BLOCKS)]}


@torch.no_grad()
def test_a_model_that_consumes_its_arguments_and_counts_is_repeated_as_if_it_had_not_been_called():
    torch.manual_seed(1)
    plain, streamed = Stateful(), Stateful()
    streamed.load_state_dict(plain.state_dict())
    given, options = control(), {}
    torch.manual_seed(2)
    wanted = [plain(inputs(), control=control(), options={}) for _ in range(3)]
    attached(streamed)
    torch.manual_seed(2)
    failing = Failing(streamed.blocks[3], 1)
    got = [streamed(inputs(), control=c, options=o) for c, o in ((control(), {}), (given, options), (control(), {}))]
    assert failing.calls == 4
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert (given, options) == ({"middle": []}, {"indices": [4, 3, 2, 1, 0]})
    assert (streamed.count, streamed.cache) == (plain.count, plain.cache)
    assert vars(streamed.tracker) == vars(plain.tracker)


class Writing(Transformer):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_writes_to_its_arguments_is_not_repeated_and_says_so(inference, caplog):
    model = Writing()
    attached(model)
    Failing(model.blocks[2], 0)
    with torch.inference_mode(inference), torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        model(inputs())
    assert "cannot be repeated" in caplog.text
    assert "which was written to" in caplog.text


DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64, torch.float64)
SHAPES = {
    "small": lambda t: t,
    "transposed": lambda t: t.t(),
    "every second": lambda t: t[:, ::2],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("size", [3, 800])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_an_argument_that_was_written_to_is_told_from_one_that_was_not(dtype, shape, size):
    tensor = SHAPES[shape]((torch.randn(size, 2 * size) * 9).to(dtype))
    call = Call(nn.Module(), (), {"options": [{"deep": (tensor,)}]}, torch.device("cpu"))
    assert call.restore() is None
    if tensor.numel():
        flat = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
        flat[1, 1] = flat[1, 1] + 1 if dtype is not torch.bool else 1 - flat[1, 1]
        assert "written to" in call.restore()


@torch.no_grad()
def test_what_a_failed_forward_had_computed_is_let_go_before_it_is_repeated(model, wanted):
    alive = []
    attached(model)
    model(inputs())
    remembered = []

    def remember(module, args, output):
        remembered.append(weakref.ref(output))

    model.blocks[1].norm.register_forward_hook(remember)
    Failing(model.blocks[3], 0)
    model.blocks[0].norm.register_forward_hook(lambda *_: alive.append(sum(one() is not None for one in remembered)))
    gc.disable()
    try:
        assert torch.equal(model(inputs()), wanted)
    finally:
        gc.enable()
    assert alive == [0, 0]


@pytest.mark.parametrize("error", [oom, lambda: ValueError("no"), KeyboardInterrupt])
@torch.no_grad()
def test_what_a_forward_that_ended_had_computed_is_let_go_without_the_garbage_collector(model, wanted, error):
    attached(model)
    model(inputs())
    remembered, always = [], range(1000)
    model.blocks[2].register_forward_hook(lambda module, args, output: remembered.append(weakref.ref(output)))
    Failing(model.blocks[3], *always, error=error)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with contextlib.suppress(torch.OutOfMemoryError, ValueError, KeyboardInterrupt):
                model(inputs())
        assert len(remembered) >= 2
        assert not any(one() is not None for one in remembered)
    finally:
        gc.enable()


# -- other programs, other threads -----------------------------------------------------------------------------------


@torch.no_grad()
def test_memory_that_other_programs_take_while_the_model_computes_is_given_back_at_once(model, wanted, monkeypatch):
    swap = attached(model)
    for _ in range(3):
        model(inputs())
    monkeypatch.setattr("intelligent_vram.vram.stream.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("intelligent_vram.vram.forward.PRESSURE", 100)
    resident, budget = swap.plan.resident_bytes, limit.budget_now(swap.device, swap.limit, 0)
    need = swap.adapter.need()
    before = iter([budget])
    monkeypatch.setattr(limit, "budget_now", lambda *_: next(before, need - resident // 2))
    assert torch.equal(model(inputs()), wanted)
    assert 0 < swap.plan.resident_bytes <= resident // 2 + SMALL
    monkeypatch.undo()
    for _ in range(2 * REGROW_AFTER):
        assert torch.equal(model(inputs()), wanted)
    assert swap.plan.resident_bytes == resident


@torch.no_grad()
def test_another_thread_gets_resident_units_back_at_once_while_the_model_computes(model, wanted):
    swap = attached(model)
    for _ in range(3):
        model(inputs())
    inside, go_on, given = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        assert go_on.wait(10)

    model.blocks[2].norm.register_forward_hook(wait)
    results = []
    worker = threading.Thread(target=lambda: results.append(model(inputs())))
    with torch.no_grad():
        worker.start()
        assert inside.wait(10)
        other = threading.Thread(target=lambda: given.append(swap.evict(1 << 60)))
        other.start()
        other.join(5)
        assert not other.is_alive(), "it need not wait for the forward to end"
        go_on.set()
        worker.join()
    assert given[0] > 0
    assert torch.equal(results[0], wanted)
    swap.detach()
    assert torch.equal(model(inputs()), wanted)
