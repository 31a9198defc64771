"""What is free is said for any device, in words a person reads, and what is not known is said too."""

import os

import psutil
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from intelligent_vram.vram import MemorySnapshot, limit, nvml, snapshot
from intelligent_vram.vram.device import facts, host_to_device_bandwidth
from intelligent_vram.vram.units import GIB, KIB, MIB, format_bytes

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def card(**values):
    """A snapshot of a card of 24 GiB with 20 GiB free, of which this process holds 3 GiB by torch and 1 GiB beside."""
    return MemorySnapshot(
        **{
            "device": CUDA,
            "device_total": 24 * GIB,
            "device_free": 20 * GIB,
            "allocated": 2 * GIB,
            "reserved": 3 * GIB,
            "peak_allocated": 3 * GIB,
            "peak_reserved": 4 * GIB,
            "process_device_used": 4 * GIB,
            "host_total": 64 * GIB,
            "host_available": 40 * GIB,
            "process_rss": 5 * GIB,
            **values,
        }
    )


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (703.1 * MIB, "703.1 MiB"),
        (GIB, "1.00 GiB"),
        (12 * GIB, "12.00 GiB"),
        (1500 * GIB, "1500.00 GiB"),
        (-300 * MIB, "-300.0 MiB"),
        (-5, "-5 B"),
    ],
)
def test_sizes_are_formatted_as_a_person_reads_them(size, words):
    assert format_bytes(size) == words


@given(st.integers(-(1 << 50), 1 << 50))
def test_a_formatted_size_is_the_size_to_three_digits(size):
    number, unit = format_bytes(size).split()
    scale = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}[unit]
    assert abs(float(number) * scale - size) <= 0.051 * scale


@given(st.integers(0, 1 << 50))
@example(MIB - 1)
@example(GIB - 1)
def test_no_size_is_written_as_more_than_1024_of_a_smaller_unit(size):
    number, unit = format_bytes(size).split()
    assert unit == "GiB" or float(number) < 1024


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_on_a_cpu_the_device_is_the_hosts_memory(device):
    now = snapshot(device)
    host = psutil.virtual_memory()
    assert now.device == CPU
    assert now.host_total == now.device_total == host.total
    assert 0 < now.host_available <= now.host_total
    assert now.device_free == now.host_available
    assert abs(now.host_available - host.available) < GIB
    assert now.allocated is None
    assert now.outside_torch == 0
    assert now.missing == ()


def test_the_process_is_this_one():
    assert abs(snapshot("cpu").process_rss - psutil.Process(os.getpid()).memory_info().rss) < 100 * MIB


def test_a_cpu_snapshot_describes_itself():
    now = snapshot("cpu")
    words = now.describe()
    assert words.startswith("cpu: ")
    assert f"of {format_bytes(now.host_total)}" in words
    assert format_bytes(now.process_rss) in words
    assert "torch" not in words
    assert "not known" not in words


def test_a_cards_snapshot_describes_card_allocator_and_ram():
    assert card().describe() == (
        "cuda:0: 20.00 GiB free of 24.00 GiB, torch holds 3.00 GiB (2.00 GiB in use); "
        "RAM: 40.00 GiB free of 64.00 GiB, this process 5.00 GiB"
    )


def test_what_is_not_known_is_said_and_counts_as_nothing():
    now = card(process_device_used=None, device_free=None, missing=("this process' memory by NVML: no driver",))
    assert "(not known: this process' memory by NVML: no driver)" in now.describe()
    assert "free of 24.00 GiB" not in now.describe()
    assert now.outside_torch == 0
    assert now.reachable is None


def test_memory_outside_torch_is_what_the_driver_counts_beyond_the_allocator():
    assert card().outside_torch == GIB
    assert card(process_device_used=2 * GIB).outside_torch == 0


def test_what_torch_holds_already_is_reachable():
    assert card().reachable == 23 * GIB
    assert card(reserved=None).reachable == 20 * GIB


# -- limits ------------------------------------------------------------------------------------------------------------


def test_the_automatic_limit_is_80_percent_of_the_card_or_what_is_free():
    assert limit.automatic_limit(card()) == int(24 * GIB * 0.8)
    busy = card(device_free=4 * GIB)
    assert limit.automatic_limit(busy) == 4 * GIB + 3 * GIB + GIB - limit.SAFETY


def test_the_automatic_limit_on_a_cpu_is_within_its_ram():
    now = snapshot("cpu")
    assert 0 < limit.automatic_limit(now) <= now.host_available


def test_the_limit_counts_what_the_process_holds_outside_torch():
    assert limit.torch_budget(10 * GIB, card()) == 9 * GIB


def test_other_programs_lower_what_is_left_of_the_limit():
    assert limit.torch_budget(20 * GIB, card(device_free=2 * GIB)) == 5 * GIB - limit.SPILLS


@given(st.integers(1, 64 * GIB), st.integers(0, 24 * GIB), st.integers(0, 24 * GIB))
def test_torch_never_gets_more_than_the_limit(max_vram, free, used):
    assert limit.torch_budget(max_vram, card(device_free=free, process_device_used=used)) <= max_vram


def test_on_a_cpu_a_limit_is_held_by_nobody_and_disturbs_nothing():
    with limit.held(CPU, 10):
        torch.empty(1000)
    assert limit.budget_now(CPU, 1000, 0) == 1000


# -- NVML and the device -----------------------------------------------------------------------------------------------


def test_without_an_nvidia_driver_nvml_says_why_in_words():
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA driver")
    for answer, reason in (nvml.process_memory(CUDA), nvml.ask(CUDA, "nvmlDeviceGetCurrPcieLinkWidth")):
        assert answer is None
        assert "nvidia-ml-py is not installed" in reason or "NVML" in reason


def test_facts_of_a_cpu():
    cpu = facts("cpu")
    assert (cpu.name, cpu.capability, cpu.pcie) == ("CPU", None, None)
    assert cpu.total_bytes == psutil.virtual_memory().total


def test_the_bandwidth_of_a_cpu_is_measured_once():
    first = host_to_device_bandwidth(CPU, 8 * MIB, 3)
    assert 1e8 < first < 1e12
    assert host_to_device_bandwidth(CPU, 8 * MIB, 3) == first
