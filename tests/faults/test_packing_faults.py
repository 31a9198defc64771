"""What fails while weights are packed, page-locked or staged: afterwards the model is whole, and nothing is left behind."""

import gc
import itertools
import logging
import mmap
import os
import threading
import weakref
from concurrent.futures import Future

import psutil
import pytest
import torch
from intelligent_vram.vram import PackedModel, Patches, SwapConfig, attach, packing
from intelligent_vram.vram.arena import Arena, FillJob
from intelligent_vram.vram.host_budget import HostBudget
from intelligent_vram.vram.host_memory import HostSegment, NoHostMemory
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.mapped_files import FileCutOff
from intelligent_vram.vram.rest import sort_tensors
from intelligent_vram.vram.staging import Piece, StagingRing, StagingStopped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engine.models import build, contents, inputs
from ..engine.page_locking import CPU, Ram, Registrar, attach_locked

NAME = "blocks in a list"
CONFIG = SwapConfig(mode="chunkwise", block_size=9000)


class Failure(Exception):
    """What these tests throw in."""


def whole(model, before):
    now = contents(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def adding(amount, which=".ffn.", fail_at=None):
    """Patches that add ``amount`` to weights whose path holds ``which``; the ``fail_at``-th of them raises."""
    calls = itertools.count()

    def apply(path, tensor):
        if next(calls) == fail_at:
            raise Failure(path)
        return tensor + amount

    return Patches(lambda path: amount if which in path and path.endswith("weight") else None, apply)


def patched(model, amount, which=".ffn."):
    """What ``model`` is with such patches."""
    copy = build(NAME)
    copy.load_state_dict(model.state_dict())
    for name, weight in copy.named_parameters():
        if which in name and name.endswith("weight"):
            weight.data += amount
    return copy


@pytest.fixture
def shared():
    return HostBudget(1 << 60, Ram())


@pytest.fixture
def nothing_left(shared):
    """After a test: no page-locked memory, thread or file handle more than before."""
    gc.collect()
    process = psutil.Process()
    before = process.num_fds(), {thread.name for thread in threading.enumerate()}
    yield
    gc.collect()
    assert (shared.locked, shared.pending) == (0, 0)
    assert (process.num_fds(), {thread.name for thread in threading.enumerate()}) == before


# -- page-locking and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [1, 3, "all but the first", "all"])
@torch.no_grad()
def test_page_locking_that_fails_part_of_the_way_costs_speed_only(refused, shared, nothing_left):
    model, x = build(NAME), inputs()
    wanted, before = model(x), contents(model)
    numbers = {"all": range(1, 999), "all but the first": range(2, 999)}.get(refused, (refused,))
    registrar = Registrar(refuse=numbers)
    swap = attach_locked(model, registrar, shared)
    assert registrar.nbytes == shared.locked <= swap.packed.host_bytes
    assert refused in (1, 3) or len(registrar.ranges) <= 1  # what is refused once is tried again
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()
    assert registrar.ranges == {}
    assert whole(model, before)


class Full:
    """An operating system that gives no memory from the n-th mapping on."""

    def __init__(self, after, error):
        self.left, self.error = after, error

    def __getattr__(self, name):
        return getattr(mmap, name)

    def mmap(self, *args, **flags):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return mmap.mmap(*args, **flags)


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
@pytest.mark.parametrize("after", [0, 1, 7])
@torch.no_grad()
def test_weights_that_the_system_has_no_memory_for_stay_where_they_are(after, error, monkeypatch, shared, nothing_left):
    model, x = build(NAME), inputs()
    wanted, before = model(x), contents(model)
    with monkeypatch.context() as patch:
        patch.setattr("intelligent_vram.vram.host_memory.mmap", Full(after, error))
        swap = attach_locked(model, registrar := Registrar(), shared)
    assert (swap.packed.host_bytes > 0) == (after > 0)
    assert swap.packed.host_bytes < swap.packed.packed_bytes
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    packed = swap.detach()
    assert whole(model, before)
    swap = attach_locked(model, registrar, shared, packed=packed)  # now there is memory
    assert swap.packed.host_bytes == swap.packed.packed_bytes
    assert torch.equal(model(x), wanted)
    swap.detach()


@torch.no_grad()
def test_patched_weights_without_memory_are_an_error_that_says_so(monkeypatch, shared, nothing_left):
    model = build(NAME)
    before = contents(model)
    with monkeypatch.context() as patch:
        patch.setattr("intelligent_vram.vram.host_memory.mmap", Full(3, OSError(12, "Cannot allocate memory")))
        with pytest.raises(NoHostMemory, match=r"no .* of RAM left for weights"):
            attach_locked(model, registrar := Registrar(), shared, patches=adding(0.5, "weight"))
        assert registrar.ranges == {}
    assert whole(model, before)


@pytest.mark.parametrize("failing", [0, 2, 5])
@pytest.mark.parametrize("here", [False, True])
def test_a_filler_that_raises_leaves_nothing_page_locked(here, failing, shared, nothing_left):
    registrar, done = Registrar(), []
    arena = Arena(CPU, threads=3, registrar=registrar, shared=shared)

    def fill(number):
        def work(buffer):
            if number == failing:
                raise Failure
            buffer.fill_(number)

        return work

    jobs = [FillJob(5000, fill(number), arena.claim(5000, 0), on_calling_thread=here) for number in range(6)]
    with pytest.raises(Failure):
        arena.fill(jobs, lambda index, segment: done.append(segment))
    assert arena.page_locked_bytes == registrar.nbytes == 5000 * len(done)
    while done:
        arena.drop(done.pop())
    assert registrar.ranges == {}
    gc.collect()
    assert shared.held == 0


def test_other_work_that_raises_while_threads_fill_leaves_nothing_page_locked(monkeypatch, shared, nothing_left):
    registrar, begun, over = Registrar(), threading.Semaphore(0), threading.Event()
    arena, filled, cancel = Arena(CPU, threads=3, registrar=registrar, shared=shared), [], Future.cancel

    def fill(buffer):
        filled.append(buffer)
        begun.release()
        assert over.wait(20)

    def fail(go_on):
        for _ in range(3):
            assert begun.acquire(timeout=20)
        raise Failure

    def cancel_and_count(future):
        result = cancel(future)
        if next(calls) == len(jobs) - 3:
            over.set()
        return result

    monkeypatch.setattr(Future, "cancel", cancel_and_count)
    jobs, calls = [FillJob(5000, fill, arena.claim(5000, 0)) for _ in range(9)], itertools.count(1)
    with pytest.raises(Failure):
        arena.fill(jobs, pytest.fail, fail)
    assert len(filled) == 3  # the others are not waited for
    filled.clear()
    assert arena.page_locked_bytes == 0
    assert registrar.ranges == {}
    gc.collect()
    assert shared.held == 0


def test_threads_that_cannot_be_started_are_an_error_and_leave_no_claim(monkeypatch, shared, nothing_left):
    model = build(NAME)
    before = contents(model)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("intelligent_vram.vram.arena.ThreadPoolExecutor.submit", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            attach_locked(model, Registrar(), shared)
    assert whole(model, before)


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_thread_that_does_not_start_leaves_no_claim_and_no_memory(started, monkeypatch, shared, nothing_left):
    registrar, done, start, calls = Registrar(), [], threading.Thread.start, itertools.count()
    arena = Arena(CPU, threads=3, registrar=registrar, shared=shared)
    jobs = [FillJob(5000, lambda buffer: None, arena.claim(5000, 0)) for _ in range(6)]

    def refuse(thread):
        if next(calls) == started:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            arena.fill(jobs, lambda index, segment: done.append(segment))
    while done:
        arena.drop(done.pop())
    gc.collect()
    assert (shared.locked, shared.pending, shared.held, arena.page_locked_bytes) == (0, 0, 0, 0)
    assert registrar.ranges == {}


def test_when_the_system_does_not_tell_its_ram_no_claim_is_left(monkeypatch, shared, nothing_left):
    arena = Arena(CPU, threads=3, registrar=Registrar(), shared=shared)
    jobs = [FillJob(5000, lambda buffer: None, arena.claim(5000, 0)) for _ in range(6)]

    def fail():
        raise OSError("the system does not tell")

    monkeypatch.setattr(shared, "ram", fail)
    with pytest.raises(OSError, match="does not tell"):
        arena.fill(jobs, pytest.fail)
    assert (shared.locked, shared.pending) == (0, 0)


@pytest.mark.parametrize("at", [0, 1, 4])
@torch.no_grad()
def test_packing_that_is_interrupted_goes_on_where_it_was(at, shared, nothing_left):
    model, x, calls = build(NAME), inputs(), itertools.count()
    wanted, before = model(x), contents(model)
    config, registrar = CONFIG, Registrar()
    packed = PackedModel(CPU, sort_tensors(model, config)[0], 9000, registrar=registrar, shared=shared)

    def progress(done, total):
        if next(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attach(model, config, "cpu", packed=packed, progress=progress)
    assert registrar.ranges == {}
    assert whole(model, before)
    swap = attach(model, config, "cpu", packed=packed)
    assert torch.equal(model(x), wanted)
    assert swap.packed is packed
    swap.detach()
    assert whole(model, before)


@torch.no_grad()
def test_a_budget_that_cannot_be_asked_is_an_error_and_leaves_no_claim(shared, nothing_left):
    model, calls = build(NAME), itertools.count()
    before = contents(model)

    def ram():
        if next(calls) == 5:
            raise Failure("the system does not tell")
        return Ram()()

    shared.ram = ram
    with pytest.raises(Failure):
        attach_locked(model, registrar := Registrar(), shared)
    assert registrar.ranges == {}
    assert whole(model, before)


# -- patches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [0, 1, 4])
@torch.no_grad()
def test_a_patch_that_raises_when_a_model_is_attached_leaves_the_model_whole(fail_at, shared, nothing_left):
    model, x = build(NAME), inputs()
    before, registrar = contents(model), Registrar()
    packed = PackedModel(CPU, sort_tensors(model, CONFIG)[0], 9000, registrar=registrar, shared=shared)
    with pytest.raises(Failure):
        attach(model, CONFIG, "cpu", packed=packed, patches=adding(0.5, fail_at=fail_at))
    assert registrar.ranges == {}
    assert whole(model, before)
    swap = attach(model, CONFIG, "cpu", packed=packed, patches=adding(0.25))
    assert torch.equal(model(x), patched(model, 0.25)(x))
    swap.detach()
    assert whole(model, before)


def streamed(packed):
    """All weights as they would be streamed, by path."""
    found = {}
    for number, layer in enumerate(packed.layers):
        for entry in layer.entries:
            found[entry.entry.path] = entry.entry.bind(packed.source(number, number + 1)).clone()
    return found


@pytest.mark.parametrize("fail_at", range(10))
@torch.no_grad()
def test_packed_weights_say_when_they_are_neither_the_old_nor_the_new_ones(fail_at, shared):
    model = build(NAME)
    packed = PackedModel(CPU, sort_tensors(model, CONFIG)[0], 9000, shared=shared)
    packed.pack(adding(0.25))
    old = streamed(packed)
    with pytest.raises(Failure):
        packed.pack(adding(0.5, fail_at=fail_at))
    now = streamed(packed)
    mixed = any(not torch.equal(now[path], weight) for path, weight in old.items())
    assert packed.torn == mixed == (fail_at > 0)
    with pytest.raises(Failure):  # bringing the old ones back fails too
        packed.pack(adding(0.25, fail_at=0) if mixed else adding(0.5, fail_at=0))
    assert packed.torn == mixed
    packed.pack(adding(0.25))
    assert not packed.torn
    assert all(torch.equal(weight, old[path]) for path, weight in streamed(packed).items())
    packed.pack()
    wanted = dict(model.named_parameters())
    assert all(torch.equal(weight, wanted[path]) for path, weight in streamed(packed).items())


@torch.no_grad()
def test_a_copy_that_breaks_off_in_the_middle_of_a_weight_is_mended(monkeypatch, shared):
    model = build(NAME)
    packed = PackedModel(CPU, sort_tensors(model, CONFIG)[0], 9000, shared=shared)
    packed.pack()
    old = streamed(packed)
    copy, calls = packing.copy_host, itertools.count()

    def broken(spec, source, buffer):
        copy(spec, source, buffer)
        if next(calls) == 1:
            spec.view(buffer).flatten()[3:].zero_()
            raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(packing, "copy_host", broken)
        with pytest.raises(Failure):
            packed.pack(adding(0.5))
    assert packed.torn
    packed.pack()
    assert not packed.torn
    assert all(torch.equal(weight, old[path]) for path, weight in streamed(packed).items())
    assert all(torch.equal(weight, old[path]) for path, weight in model.named_parameters() if path in old)


@torch.no_grad()
def test_a_change_of_patches_that_fails_twice_never_computes_with_a_mixture():
    model, x = build(NAME), inputs()
    before = contents(model)
    old, new = patched(model, 0.25)(x), patched(model, 0.5)(x)
    swap = attach(model, CONFIG, "cpu", patches=(first := adding(0.25)))
    broken = [True]

    def apply(path, tensor):
        if broken[0] and path.startswith("blocks.3"):
            raise Failure(path)
        return first.apply(path, tensor)

    swap._patches = Patches(first.signature, apply)  # the old patches cannot be made again for now
    with pytest.raises(Failure):
        swap.repack(adding(0.5, fail_at=8))
    with pytest.raises(Failure):
        model(x)
    broken[0] = False
    assert torch.equal(model(x), old)
    swap.repack(adding(0.5))
    assert torch.equal(model(x), new)
    swap.detach()
    assert whole(model, before)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_model(tmp_path):
    """A model whose weights lie in a file, and the file."""
    path = tmp_path / "model.safetensors"
    save_file(build(NAME).state_dict(), path)
    model = build(NAME)
    model.load_state_dict(load_file(path), assign=True)
    return model, path


@torch.no_grad()
def test_a_file_that_was_deleted_or_replaced_after_loading_is_read_as_it_was(file_model, shared, tmp_path):
    model, path = file_model
    x = inputs()
    wanted = model(x)
    path.unlink()
    save_file({"other": torch.zeros(3)}, path)
    swap = attach(model, SwapConfig(block_size=9000, host_budget=0), "cpu")
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    swap.detach()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not tell what is mapped")
@pytest.mark.parametrize("budget", [None, 0])
@torch.no_grad()
def test_a_file_that_was_cut_off_is_an_error_that_names_it_before_anything_is_touched(budget, file_model, monkeypatch):
    model, path = file_model
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    whole_file = path.read_bytes()
    os.truncate(path, len(whole_file) // 2)
    with pytest.raises(FileCutOff, match=r"model\.safetensors was cut off"):
        attach(model, SwapConfig(block_size=9000, host_budget=budget), "cpu")
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    path.write_bytes(whole_file)
    swap = attach(model, SwapConfig(block_size=9000, host_budget=budget), "cpu")
    model(inputs())
    swap.detach()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not tell what is mapped")
@torch.no_grad()
def test_a_file_that_is_cut_off_between_forwards_is_an_error_and_not_the_end_of_the_process(file_model):
    model, path = file_model
    x = inputs()
    wanted, whole_file = model(x), path.read_bytes()
    swap = attach(model, SwapConfig(mode="chunkwise", block_size=9000, host_budget=0), "cpu")
    assert torch.equal(model(x), wanted)
    swap.streamer.release_all()
    os.truncate(path, len(whole_file) // 2)
    with pytest.raises(FileCutOff):
        model(x)
    with open(path, "r+b") as file:
        file.write(whole_file)
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert torch.equal(model(x), wanted)


def test_a_file_shorter_than_its_header_says_is_refused_when_it_is_loaded(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build(NAME).state_dict(), path)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(SafetensorError, match=r"incomplete|not fully covered"):
        load_file(path)


# -- the staging thread ------------------------------------------------------------------------------------------------


def staging_threads():
    return [thread for thread in threading.enumerate() if thread.name == "intelligent-vram-staging"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_jobs_behind_one_that_kills_the_staging_thread_are_told_and_the_next_starts_another():
    ring, results, gate = StagingRing(Link(CPU)), [], threading.Event()
    target, source = torch.zeros(8, dtype=torch.uint8), torch.arange(8, dtype=torch.uint8)

    def die():
        gate.wait(30)
        raise SystemExit

    for before in (die, lambda: None, lambda: None):
        ring.submit([Piece(source, 0, 8)], target, before, results.append)
    (thread,) = staging_threads()
    gate.set()
    thread.join(30)
    assert [type(error) for error in results] == [SystemExit, StagingStopped, StagingStopped]
    done = threading.Event()
    ring.submit([Piece(source, 0, 8)], target, lambda: None, lambda error: (results.append(error), done.set()))
    assert done.wait(30)
    assert results[-1] is None
    assert target.equal(source)
    ring.close()
    assert staging_threads() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@torch.no_grad()
def test_a_model_goes_on_after_its_staging_thread_died(monkeypatch):
    model, x = build(NAME), inputs()
    wanted, before = model(x), contents(model)
    swap = attach(model, SwapConfig(mode="chunkwise", block_size=9000, host_budget=0), "cpu")
    assert torch.equal(model(x), wanted)
    copy, calls = StagingRing._copy, itertools.count()

    def die(ring, piece, target):
        if next(calls) == 6:
            raise SystemExit
        copy(ring, piece, target)

    with monkeypatch.context() as patch:
        patch.setattr(StagingRing, "_copy", die)
        for _ in range(3):
            try:
                assert torch.equal(model(x), wanted)
            except (SystemExit, StagingStopped):
                continue
        assert next(calls) > 6
    assert torch.equal(model(x), wanted)
    swap.detach()
    assert staging_threads() == []
    assert whole(model, before)


class Lost(Link):
    """A link whose device is lost at some point."""

    lost = False

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: the device is lost")

    def copy(self, target, source):
        self.synchronize()
        super().copy(target, source)


def test_a_ring_is_closed_also_when_the_device_is_lost():
    link, errors, done = Lost(CPU), [], threading.Event()
    ring, target = StagingRing(link, registrar := Registrar()), torch.zeros(8, dtype=torch.uint8)
    source = torch.arange(8, dtype=torch.uint8)
    ring.submit([Piece(source, 0, 8)], target, lambda: None, lambda error: (errors.append(error), done.set()))
    assert done.wait(30)
    assert registrar.nbytes > 0
    buffers = [weakref.ref(segment) for segment, _ in ring._buffers]
    link.lost = True
    with pytest.raises(RuntimeError, match="lost"):
        ring.close()
    assert registrar.ranges == {}
    assert staging_threads() == []
    gc.collect()
    assert all(segment() is None for segment in buffers)


@torch.no_grad()
def test_packed_weights_are_given_back_also_when_the_device_is_lost(shared, caplog, nothing_left):
    model = build(NAME)
    before = contents(model)
    swap = attach_locked(model, registrar := Registrar(), shared)
    registrar.lost = True
    with caplog.at_level(logging.WARNING):
        swap.detach()
    assert registrar.ranges == {}
    assert "the device is lost" in caplog.text
    assert len([line for line in caplog.messages if "did not take back" in line]) == 1
    assert whole(model, before)


def test_a_segment_that_is_forgotten_is_unlocked():
    registrar = Registrar()
    segment = HostSegment(10_000)
    assert segment.page_lock(registrar)
    view = segment.buffer[5:9]
    view.fill_(7)
    del segment
    gc.collect()
    assert registrar.ranges == {}
    assert view.tolist() == [7, 7, 7, 7]
