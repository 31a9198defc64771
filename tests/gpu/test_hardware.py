"""What is measured of a real card: plausible, once, without a trace, and on a card that is nearly full too."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from intelligent_vram.vram import cards, device, hardware, snapshot
from intelligent_vram.vram.units import GIB, MIB

from .conftest import ON_A_CARD

pytestmark = ON_A_CARD

RATES = ("to_device", "to_host", "matmul", "attention", "memory")


@pytest.fixture(scope="module")
def here() -> hardware.Hardware:
    return hardware.measure("cuda")


@pytest.fixture
def warm() -> Iterator[None]:
    """The libraries' own workspaces are there before memory is counted."""
    device.measure_rates("cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@contextlib.contextmanager
def filled(left: int) -> Iterator[None]:
    """While inside, all of the card but ``left`` bytes is taken, and nothing was measured before. Also what is free within
    segments of torch's that other tests hold in part: whoever measures would find it."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = [torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")]
    # so that no new segment comes of what follows
    spare = torch.empty(left - 4 * MIB, dtype=torch.uint8, device="cuda")
    for size in (64 * MIB, 8 * MIB, 2 * MIB):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    del spare
    torch.cuda.empty_cache()
    hardware.forget()
    try:
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of a few runs, as plainly as can be."""
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times[1:])


def test_everything_is_measured(here: hardware.Hardware) -> None:
    assert here.device == f"cuda:{torch.cuda.current_device()}"
    assert here.name == torch.cuda.get_device_name()
    assert all(here.source[name] == "measured" for name in RATES), here.source
    assert here.capability is not None
    if here.capability >= (8, 9):
        assert here.source["matmul_fp8"] == "measured"
        assert here.matmul_fp8 > 0.8 * here.matmul


def test_rates_are_plausible_beside_each_other(here: hardware.Hardware) -> None:
    assert 0.5e9 < here.to_device < 500e9
    assert 0.2 < here.to_host / here.to_device < 5
    assert here.memory > 2 * here.to_device
    assert 0.1 < here.attention / here.matmul < 2
    assert 1e12 < here.matmul < 5e15


def test_copies_are_as_fast_as_torchs_own_page_locked_memory(here: hardware.Hardware) -> None:
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    there = 256 * MIB / seconds(lambda: card.copy_(host, non_blocking=True))
    back = 256 * MIB / seconds(lambda: host.copy_(card, non_blocking=True))
    assert 0.6 < here.to_device / there < 1.6
    assert 0.6 < here.to_host / back < 1.6
    assert 0.6 < device.host_to_device_bandwidth(torch.device("cuda")) / there < 1.6


def test_products_are_as_fast_as_a_larger_one(here: hardware.Hardware) -> None:
    dtype = torch.bfloat16 if here.dtype == "bf16" else torch.float16
    x, weight = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    assert 0.4 < here.matmul / (2 * 8192**3 / seconds(lambda: x @ weight)) < 2


def test_the_table_is_not_far_from_what_is_measured(here: hardware.Hardware) -> None:
    try:
        entry = cards.find(here.name, here.device_total)
    except ValueError:
        pytest.skip(f"{here.name} is not in the table")
    assert 0.9 < entry.vram / here.device_total < 1.1
    assert entry.capability == here.capability
    for name in ("matmul", "attention", "memory"):
        assert 0.4 < getattr(here, name) / getattr(entry, name) < 2.5, name


def test_the_memory_of_the_card_adds_up(here: hardware.Hardware) -> None:
    held = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    now = hardware.measure("cuda")
    assert now.device_free + now.torch_reserved + now.outside_torch + now.others == now.device_total
    assert now.torch_reserved >= 512 * MIB
    assert now.reachable == now.device_free + now.torch_reserved
    assert sum("this program" in line for line in now.describe()) == 1
    del held


def test_it_is_measured_once_and_memory_is_read_each_time(here: hardware.Hardware) -> None:
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    again = hardware.measure("cuda:0" if torch.cuda.current_device() == 0 else "cuda")
    assert all(getattr(again, name) == getattr(here, name) for name in RATES)
    assert again.torch_reserved >= GIB
    del held


def test_nothing_is_left(warm: None) -> None:
    before, threads = snapshot("cuda"), threading.active_count()
    random = torch.cuda.get_rng_state()
    for _ in range(2):
        device.measure_rates("cuda")
    after = snapshot("cuda")
    assert after.allocated == before.allocated
    assert after.reserved == before.reserved
    assert abs(after.device_free - before.device_free) < 64 * MIB
    assert after.process_rss - before.process_rss < 200 * MIB
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert threading.active_count() == threads


def test_it_can_be_measured_on_another_stream_and_in_inference_mode(warm: None, here: hardware.Hardware) -> None:
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", torch.float16):
        rates = device.measure_rates("cuda")
    assert 0.3 < rates.matmul.value / here.matmul < 3


def test_work_of_others_comes_out_right(warm: None) -> None:
    """The probe's copies must not write to memory that a queued computation of the same process still reads."""
    x = torch.randn(2048, 2048, device="cuda")
    expected = (x @ x).sum()
    results, done = [], threading.Event()

    def compute() -> None:
        while not done.is_set():
            batch = [(x @ x.clone()).sum() for _ in range(20)]
            results.extend(torch.equal(result, expected) for result in batch)

    worker = threading.Thread(target=compute)
    worker.start()
    try:
        for _ in range(2):
            queued = [(x @ x.clone()).sum() for _ in range(50)]
            device.measure_rates("cuda")
            assert all(torch.equal(result, expected) for result in queued)
    finally:
        done.set()
        worker.join()
    assert len(results) > 20
    assert all(results)


@pytest.mark.parametrize("left", [450 * MIB, 150 * MIB])
def test_a_card_that_is_nearly_full_is_measured(left: int, warm: None, here: hardware.Hardware) -> None:
    with filled(left):
        full = hardware.measure("cuda")
    assert full.device_free <= left
    assert any("little free memory" in words for words in full.source.values())
    for name in RATES:
        assert 0.2 < getattr(full, name) / getattr(here, name) < 5, (name, full.source[name])


def test_a_card_that_is_full_is_looked_up(warm: None, here: hardware.Hardware) -> None:
    try:
        entry = cards.find(here.name, here.device_total)
    except ValueError:
        with filled(20 * MIB), pytest.raises(hardware.NotMeasurable, match="close other programs"):
            hardware.measure("cuda")
        return
    with filled(20 * MIB):
        full = hardware.measure("cuda")
    assert (full.matmul, full.attention, full.memory) == (entry.matmul, entry.attention, entry.memory)
    assert all(full.source[name].startswith("table: ") for name in RATES)
    assert 0.2 < full.to_device / here.to_device < 5


def test_a_full_card_is_measured_again_when_there_is_room(warm: None) -> None:
    with filled(450 * MIB):
        first = hardware.rates("cuda")
        assert first.limited
        assert hardware.rates("cuda") is first
    assert not hardware.rates("cuda").limited


def in_a_process(visible: str, code: str) -> str:
    """What ``code`` prints in a process that sees the cards that ``visible`` names."""
    paths = os.pathsep.join(path for path in (str(Path(hardware.__file__).parents[2]), *sys.path) if path)
    run = subprocess.run(
        [sys.executable, "-c", f"from intelligent_vram.vram import device, hardware\n{code}"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_cards_that_are_hidden_are_not_there() -> None:
    refused = "\ntry:\n    device.facts('cuda:0')\nexcept device.NoDevice as error:\n    print(error)"
    assert "CUDA_VISIBLE_DEVICES is ''" in in_a_process("", refused)


def test_an_index_beyond_the_cards_that_are_seen_is_refused_with_those_that_are() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(device.NoDevice, match=f"there is no cuda:{count}: {count} seen"):
        hardware.measure(f"cuda:{count}")


def test_a_card_is_seen_by_its_uuid() -> None:
    if "MIG" in torch.cuda.get_device_name(0):
        pytest.skip("a slice is named otherwise")
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert in_a_process(uuid, "print(device.facts('cuda').name)") == torch.cuda.get_device_name(0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_card_is_measured_by_its_own_index() -> None:
    held = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda:1")
    current = torch.cuda.current_device()
    first, second = hardware.measure("cuda:0"), hardware.measure("cuda:1")
    assert (first.device, second.device) == ("cuda:0", "cuda:1")
    assert second.torch_reserved >= 2 * GIB
    assert torch.cuda.current_device() == current
    assert torch.cuda.memory_allocated("cuda:1") >= 2 * GIB
    uuid = torch.cuda.get_device_properties(1).uuid
    seen = in_a_process(
        f"GPU-{uuid}", "import torch; print(torch.cuda.get_device_properties(device.resolve('cuda')).uuid)"
    )
    assert seen == str(uuid)
    del held
