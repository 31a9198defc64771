"""Several models share one budget of page-locked RAM: who computes has it, who was used least recently gives it back."""

import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.arena import AHEAD, Arena, FillJob
from intelligent_vram.vram.discover import Slotted
from intelligent_vram.vram.host_budget import HostBudget, page_lockable, process_budget, ram
from intelligent_vram.vram.page_lock import most_page_locked, registrar_for
from intelligent_vram.vram.patches import NO_PATCHES
from intelligent_vram.vram.rest import Rest
from intelligent_vram.vram.units import GIB
from torch import nn

from .models import Transformer, build, contents, inputs
from .page_locking import CPU, Ram, Registrar, attach_locked, shared_budget

PACKED = 260_000  # bytes, about, of "blocks in a list" when packed


@pytest.fixture
def models():
    names = ("blocks in a list", "two lists", "a list between the blocks")
    return {name: build(name) for name in names}


def locked(swap):
    return swap.packed.arena.page_locked_bytes


# -- how much ----------------------------------------------------------------------------------------------------------


def test_what_may_be_page_locked_leaves_the_system_4_gib_or_a_tenth():
    assert page_lockable(32 * GIB, 20 * GIB) == 16 * GIB
    assert page_lockable(128 * GIB, 100 * GIB) == 100 * GIB - 128 * GIB // 10
    assert page_lockable(32 * GIB, 3 * GIB) == 0


@torch.no_grad()
def test_what_is_packed_already_counts_in_as_ours():
    budget = HostBudget(1 << 60, memory := Ram(64 * GIB, 40 * GIB))
    before = budget.quota()
    swap = attach_locked(build("blocks in a list"), Registrar(), budget)
    memory.available -= swap.packed.host_bytes
    assert budget.held == swap.packed.host_bytes
    assert budget.quota() == before
    swap.detach()
    del swap
    gc.collect()
    assert budget.held == 0


@pytest.mark.parametrize(("free", "most"), [(64 * 5000, 4), (24 * 5000, 3), (8 * 5000, 1), (0, 1)])
def test_the_less_ram_is_free_the_fewer_segments_are_filled_at_the_same_time(free, most):
    together, now, lock = [], [], threading.Lock()
    other = threading.Event()

    def fill(buffer):
        with lock:
            now.append(threading.get_ident())
            together.append(len(now))
            if len(now) == most:
                other.set()
        assert other.wait(20)
        with lock:
            now.remove(threading.get_ident())

    arena = Arena(CPU, threads=4, shared=HostBudget(1 << 60, Ram(available=free)))
    done = []
    arena.fill([FillJob(5000, fill, page_lock=False)] * 6, lambda index, segment: done.append(index))
    assert max(together) == most
    assert sorted(done) == list(range(6))


def test_other_work_is_done_once_while_threads_fill():
    begun, over, order = threading.Event(), threading.Event(), []

    def fill(buffer):
        begun.set()
        assert over.wait(20)
        buffer.fill_(1)

    def work(go_on):
        assert begun.wait(20)
        order.append(threading.current_thread())
        over.set()

    arena = Arena(CPU, threads=2, shared=HostBudget(1 << 60, Ram(available=1 << 40)))
    arena.fill([FillJob(5000, fill, page_lock=False)] * 5, lambda index, segment: order.append(index), work)
    assert order[0] is threading.current_thread()
    assert sorted(order[1:]) == list(range(5))
    arena.fill([], lambda index, segment: order.append(index), lambda go_on: order.append("work"))
    assert order[6:] == ["work"]


def test_threads_are_only_so_far_ahead_of_what_is_taken():
    ahead, lock, most, filled = [0], threading.Lock(), [0], threading.Semaphore(0)

    def fill(buffer):
        with lock:
            ahead[0] += 1
            most[0] = max(most[0], ahead[0])
        filled.release()

    def wait_for_all_that_may_be(go_on):
        for _ in range(3 * AHEAD):
            assert filled.acquire(timeout=20)

    def take(index, segment):
        with lock:
            ahead[0] -= 1

    arena = Arena(CPU, threads=3, shared=HostBudget(1 << 60, Ram(available=1 << 40)))
    arena.fill([FillJob(5000, fill, page_lock=False)] * 50, take, wait_for_all_that_may_be)
    assert most[0] == 3 * AHEAD


def test_other_work_lets_threads_go_on():
    own, taken, seen = 30, [], []

    def work(go_on):
        deadline = time.monotonic() + 20
        while len(taken) < own and time.monotonic() < deadline:
            go_on()
            time.sleep(0.001)
        go_on()
        seen.extend(taken)

    arena = Arena(CPU, threads=3, shared=HostBudget(1 << 60, Ram(available=1 << 40)))
    jobs = [FillJob(5000, torch.Tensor.zero_, False, on_calling_thread=number == own) for number in range(50)]
    arena.fill(jobs, lambda index, segment: taken.append(index), work)
    assert sorted(seen) == list(range(own))  # what the calling thread fills itself comes later, and what is behind it
    assert sorted(taken) == list(range(50))


def test_what_does_not_stream_is_placed_while_threads_go_on():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    weights = [Slotted(str(number), layer._parameters, "weight", layer.weight) for number, layer in enumerate(model)]
    rest, calls = Rest(CPU), []
    rest.place([*weights, weights[0]], NO_PATCHES, lambda: calls.append(rest.nbytes))
    assert calls == [256 * count for count in range(1, 6)]
    rest.clear()


def test_linux_sets_no_limit_windows_half_of_the_ram(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    assert most_page_locked(64 * GIB) is None
    monkeypatch.setattr("platform.release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert most_page_locked(64 * GIB) == 32 * GIB
    monkeypatch.setattr("sys.platform", "win32")
    assert 28 * GIB < most_page_locked(64 * GIB) < 32 * GIB


def test_nothing_is_page_locked_for_a_cpu():
    assert registrar_for(CPU) is None
    before = process_budget().locked
    swap = attach(build("blocks in a list"), SwapConfig(block_size=9000), "cpu")
    assert process_budget().locked == before
    assert locked(swap) == 0
    swap.detach()


@torch.no_grad()
def test_without_free_ram_weights_stay_where_they_are_and_stream():
    model, x = build("blocks in a list"), inputs()
    wanted, places = model(x), {name: weight.data_ptr() for name, weight in model.named_parameters()}
    swap = attach_locked(model, registrar := Registrar(), HostBudget(None, Ram(16 * GIB, 3 * GIB)))
    assert swap.packed.host_bytes == registrar.nbytes == 0
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places


# -- who gives back ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_models_that_fit_the_budget_are_both_page_locked(models):
    registrar, shared = Registrar(), shared_budget(10 * PACKED)
    swaps = [attach_locked(model, registrar, shared) for model in models.values()]
    for swap in swaps:
        assert locked(swap) == swap.packed.packed_bytes
    assert shared.locked == registrar.nbytes == sum(map(locked, swaps))
    for swap in swaps:
        swap.detach()
    assert shared.locked == registrar.nbytes == 0


@torch.no_grad()
def test_the_model_used_least_recently_gives_back_first(models):
    x, registrar = inputs(), Registrar()
    first, second, third = models.values()
    shared = shared_budget(None)
    shared.limit = 1 << 60
    one, two = attach_locked(first, registrar, shared), attach_locked(second, registrar, shared)
    first(x)  # now the second is the one that was used least recently
    wanted = [model(x) for model in (first, second)]
    first(x)
    held = locked(one)
    shared.limit = shared.locked  # the budget is spent
    three = attach_locked(third, registrar, shared)
    assert locked(one) == held or locked(two) == 0
    assert locked(two) < two.packed.host_bytes
    assert shared.locked <= shared.limit
    assert registrar.nbytes == shared.locked
    for model, result in zip((first, second), wanted, strict=True):
        assert torch.equal(model(x), result)
    for swap in (one, two, three):
        swap.detach()
    assert shared.locked == registrar.nbytes == 0


@torch.no_grad()
def test_a_model_that_lost_its_page_locked_memory_computes_the_same(models):
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    first, second, _ = models.values()
    wanted = first(x)
    one = attach_locked(first, registrar, shared)
    assert torch.equal(first(x), wanted)
    shared.limit = shared.locked
    two = attach_locked(second, registrar, shared)
    assert locked(one) < one.packed.host_bytes
    for _ in range(3):
        assert torch.equal(first(x), wanted)
    two.detach()
    one.detach()
    assert torch.equal(first(x), wanted)


@torch.no_grad()
def test_page_locked_memory_comes_back_when_the_other_model_is_detached(models):
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    first, second, _ = models.values()
    one = attach_locked(first, registrar, shared)
    shared.limit = shared.locked
    two = attach_locked(second, registrar, shared)
    two.detach()
    first(x)
    assert locked(one) == one.packed.host_bytes == registrar.nbytes
    assert all(isinstance(unit.source, torch.Tensor) for unit in one.streamer.units)
    one.detach()


@torch.no_grad()
def test_models_that_compute_in_turn_do_not_take_memory_from_each_other_at_every_step(models):
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    first, second, _ = models.values()
    one = attach_locked(first, registrar, shared)
    shared.limit = shared.locked
    two = attach_locked(second, registrar, shared)
    first(x)
    second(x)
    calls = registrar.calls
    for _ in range(5):
        first(x)
        second(x)
    assert registrar.calls == calls
    one.detach()
    two.detach()


@torch.no_grad()
def test_a_model_that_computes_alone_for_a_while_gets_its_memory_back(models):
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    first, second, _ = models.values()
    one = attach_locked(first, registrar, shared)
    shared.limit = shared.locked
    two = attach_locked(second, registrar, shared)
    second(x)
    first(x)
    first(x)  # since its last forward nobody else computed
    assert locked(one) == one.packed.host_bytes
    assert locked(two) < two.packed.host_bytes
    one.detach()
    two.detach()


class Waiting(nn.Module):
    """A block that waits, in the middle of a forward, until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.here, self.go = None, None

    def forward(self, x):
        if self.here is not None:
            self.here.set()
            assert self.go.wait(30)
        return self.linear(x)


@torch.no_grad()
def test_a_model_that_computes_gives_nothing_back(models):
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    busy, results = Transformer(Waiting, 4), []
    wanted = busy(x)
    one = attach_locked(busy, registrar, shared, SwapConfig(mode="chunkwise", block_size=1))
    held, shared.limit = locked(one), shared.locked
    busy.blocks[2].here, busy.blocks[2].go = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: results.append(busy(x)))
    thread.start()
    assert busy.blocks[2].here.wait(30)
    two = attach_locked(models["two lists"], registrar, shared)
    assert locked(one) == held
    assert locked(two) == 0
    busy.blocks[2].go.set()
    thread.join(30)
    assert torch.equal(results[0], wanted)
    two.detach()
    one.detach()
    assert shared.locked == registrar.nbytes == 0


@torch.no_grad()
def test_a_model_that_attaches_in_its_own_forward_does_not_take_from_itself(models):
    """As on one thread, where locks alone would not tell."""
    x, registrar, shared = inputs(), Registrar(), shared_budget(1 << 60)
    outer = Transformer(count=3)
    one = attach_locked(outer, registrar, shared)
    held, shared.limit = locked(one), shared.locked
    inner = []
    outer.blocks[1].register_forward_pre_hook(
        lambda *_: inner.append(attach_locked(models["two lists"], registrar, shared)) if not inner else None
    )
    outer(x)
    assert locked(one) == held
    assert locked(inner[0]) == 0
    inner[0].detach()
    one.detach()


# -- explicit budgets --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_budget_of_the_users_own_is_kept_and_granted(models):
    registrar, shared = Registrar(), shared_budget(1000)
    config = SwapConfig(mode="chunkwise", block_size=9000, host_budget=100_000)
    swap = attach_locked(models["blocks in a list"], registrar, shared, config)
    assert 100_000 - 2 * 9000 * 4 < locked(swap) <= 100_000
    packed = swap.detach()
    again = attach_locked(models["blocks in a list"], registrar, shared, config, packed)
    assert locked(again) <= 100_000
    again.detach()
    assert shared.locked == 0


@torch.no_grad()
def test_a_budget_of_the_users_own_takes_from_others_first(models):
    registrar, shared = Registrar(), shared_budget(1 << 60)
    first, second, _ = models.values()
    one = attach_locked(first, registrar, shared)
    held, shared.limit = locked(one), shared.locked
    two = attach_locked(second, registrar, shared, SwapConfig(mode="chunkwise", block_size=9000, host_budget=50_000))
    assert locked(two) > 0
    assert locked(one) < held
    assert shared.locked <= shared.limit
    two.detach()
    one.detach()


# -- the driver's own limit ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_the_driver_refuses_others_give_back_and_it_is_asked_again(models):
    first, second, _ = models.values()
    shared = shared_budget(1 << 60)
    one = attach_locked(first, registrar := Registrar(), shared)
    registrar.most = registrar.nbytes
    two = attach_locked(second, registrar, shared)
    assert locked(two) == two.packed.host_bytes
    assert locked(one) < one.packed.host_bytes
    assert registrar.nbytes == shared.locked
    one.detach()
    two.detach()


@torch.no_grad()
def test_what_the_driver_refuses_is_said_once_and_streams(models, caplog):
    model, x = models["blocks in a list"], inputs()
    wanted, before = model(x), contents(model)
    shared = shared_budget(1 << 60)
    swap = attach_locked(model, registrar := Registrar(most=60_000), shared)
    assert 0 < locked(swap) <= 60_000
    assert shared.locked == registrar.nbytes == locked(swap)
    assert len([line for line in caplog.messages if "refused to page-lock" in line]) <= 2
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in contents(model).items())


# -- threads and many runs -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_models_on_threads_of_their_own_share_the_budget_without_a_word(models):
    """Each attaches, computes and detaches on its own while the others do; the budget holds about one of them."""
    x, registrar, shared = inputs(), Registrar(), shared_budget(PACKED)
    wanted = {name: model(x) for name, model in models.items()}
    failures = []

    def work(name):
        packed, generator = None, random.Random(name)
        try:
            for _ in range(15):
                swap = attach_locked(models[name], registrar, shared, packed=packed)
                for _ in range(generator.randrange(3)):
                    assert torch.equal(models[name](x), wanted[name])
                assert registrar.nbytes <= PACKED
                packed = swap.detach()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert shared.locked == registrar.nbytes == shared.pending == 0


def test_ram_does_not_grow_over_200_runs_of_two_models_in_turn_with_changing_patches():
    # with this setting glibc maps large memory and unmaps it when freed, so that what is counted is what is used
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, str(Path(__file__).with_name("many_runs.py"))]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    early, late = json.loads(ran.stdout).values()
    assert late.pop("rss") < 1.01 * early.pop("rss")
    assert late == early
    assert late["locked"] == [0, 0, 0]


def test_the_real_machine_answers():
    total, available = ram()
    assert 0 < available <= total
    assert process_budget().quota() <= total
    assert "page-locked" in process_budget().describe()
