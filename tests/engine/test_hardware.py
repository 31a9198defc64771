"""What a plan needs to know of a machine: measured where the device is, looked up where it is not, said in words."""

import random
import threading
import time
import warnings

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram import MemorySnapshot, cards, device, hardware, host_budget
from intelligent_vram.vram.device import NoDevice, Rate, Rates, resolve
from intelligent_vram.vram.units import GIB, MIB

RATES = ("to_device", "to_host", "matmul", "matmul_fp8", "attention", "memory", "calls")
CPU = torch.device("cpu")
LITTLE = Rate(1e9, "with little free memory", fair=False)
PLENTY = Rates(*[Rate(1e12)] * 7)


@pytest.fixture(scope="module")
def cpu():
    return hardware.measure("cpu")


def found(name, total=24 * GIB, pcie=None):
    """A card as the driver describes it."""
    return device.DeviceFacts(torch.device("cuda", 0), name, (8, 9), total, pcie)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_cpu_is_measured_as_a_device(cpu):
    assert (cpu.name, cpu.device, cpu.capability, cpu.dtype) == ("CPU", "cpu", None, "fp32")
    assert cpu.matmul_fp8 is None
    for name in set(RATES) - {"matmul_fp8"}:
        assert (1e3 if name == "calls" else 1e7) < getattr(cpu, name) < 1e14, name
        assert cpu.source[name] == "measured"
    assert cpu.source["matmul_fp8"] == "no such kernels"


def test_the_memory_of_a_cpu_is_the_hosts(cpu):
    assert cpu.device_total == cpu.host_total == psutil.virtual_memory().total
    assert cpu.reachable == cpu.device_free == cpu.host_available
    assert cpu.device_free + cpu.torch_reserved + cpu.outside_torch + cpu.others == cpu.device_total


def test_rates_are_measured_once_and_memory_is_read_each_time(cpu):
    first = hardware.rates("cpu")
    before = hardware.measure("cpu")
    held = torch.ones(400 * MIB, dtype=torch.uint8)
    after = hardware.measure("cpu")
    assert hardware.rates(CPU) is first
    assert all(getattr(before, name) == getattr(after, name) == getattr(cpu, name) for name in RATES)
    assert after.host_available != before.host_available
    del held


def test_what_was_measured_can_be_forgotten(cpu):
    first = hardware.rates("cpu")
    hardware.forget()
    assert hardware.rates("cpu") is not first


def test_measuring_changes_nothing_of_the_callers_settings():
    torch.manual_seed(7)
    random.seed(7)
    states = torch.random.get_rng_state(), random.getstate()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.measure_rates("cpu")
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_measuring_works_inside_inference_mode_and_autocast():
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert device.measure_rates("cpu").matmul.value > 0
        assert torch.is_autocast_enabled("cpu")


def test_measuring_while_another_thread_computes_disturbs_nothing():
    torch.manual_seed(1)
    x = torch.randn(64, 64)
    expected = torch.linalg.matrix_power(x / 10, 9)
    results, done = [], threading.Event()

    def compute():
        while not done.is_set():
            results.append(torch.equal(torch.linalg.matrix_power(x / 10, 9), expected))

    worker = threading.Thread(target=compute)
    worker.start()
    try:
        device.measure_rates("cpu")
    finally:
        done.set()
        worker.join()
    assert results
    assert all(results)


def test_with_little_free_memory_less_is_taken_and_it_is_said(monkeypatch):
    works = [device._memory_work(CPU, size * MIB) for size in (1, 2, 256)]
    monkeypatch.setattr(device, "room", lambda _: 4 * MIB)  # a CPU cannot be filled; tests/gpu fills a card
    rate = device._rate(works, CPU, seconds=10)
    assert (rate.note, rate.fair) == ("with little free memory", False)
    assert device._rate(works[2:], CPU, seconds=10) is None
    assert device.measure_rates("cpu").limited
    monkeypatch.setattr(device, "room", lambda _: 6 * MIB)
    assert device._rate(works[:2], CPU, seconds=10).note == ""


def test_on_a_slow_device_a_small_size_is_enough():
    works = [device._memory_work(CPU, size * MIB) for size in (1, 64)]
    rate = device._rate(works, CPU, seconds=1e-6)
    assert (rate.note, rate.fair) == ("", True)


def test_a_run_that_waited_for_something_does_not_make_a_device_slow():
    waits = iter([0.2] * 3)  # the run that is not counted and both that choose

    def small() -> None:
        time.sleep(next(waits, 0.0))

    works = [
        device._Work(1.0, 1, lambda: small),
        device._Work(20.0, 1, lambda: lambda: None, note=lambda: "the larger one"),
    ]
    assert device._rate(works, CPU, seconds=1).note == "the larger one"


def test_with_no_memory_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(device, "room", lambda _: 0)
    assert device.measure_rates("cpu") == Rates(*[None] * 7)


# -- what could not be measured ----------------------------------------------------------------------------------------


def test_what_was_measured_fairly_is_taken():
    assert hardware._value("matmul", PLENTY, found("NVIDIA GeForce RTX 4090")) == (1e12, "measured")


def test_what_did_not_fit_is_looked_up_by_the_cards_name():
    here = found("NVIDIA GeForce RTX 4060 Ti", 16 * 1000**3)
    value, words = hardware._value("matmul", Rates(None, None, LITTLE, None, None, None, None), here)
    assert value == cards.find("4060 ti 16gb").matmul
    assert words == "table: RTX 4060 Ti 16GB; too little free memory to measure"


def test_the_link_is_taken_from_the_slot_that_the_card_is_in():
    here = found("NVIDIA GeForce RTX 4090", pcie=(3, 8))
    value, words = hardware._value("to_device", Rates(*[None] * 7), here)
    assert value == cards.PCIE_LANE[3] * 8
    assert words.startswith("table: PCIe 3 x8")


def test_a_little_measurement_is_better_than_none():
    rates = Rates(None, None, LITTLE, None, None, None, None)
    value, words = hardware._value("matmul", rates, found("Some Card"))
    assert value == 1e9
    assert words == "measured, with little free memory, likely more"


def test_how_fast_python_starts_operations_is_assumed_where_it_was_not_measured():
    assert hardware._value("calls", Rates(*[None] * 7), found("Some Card")) == (hardware.CALLS, "assumed")


def test_a_full_card_that_nobody_knows_is_refused_with_what_to_do():
    with pytest.raises(hardware.NotMeasurable, match=r"Some Card \(cuda:0\).*close other programs"):
        hardware._value("attention", Rates(*[None] * 7), found("Some Card"))


def test_fp8_is_none_where_there_are_no_kernels_and_looked_up_where_there_was_no_room():
    here = found("NVIDIA GeForce RTX 4090")
    without = Rates(Rate(1.0), Rate(1.0), Rate(1.0), None, Rate(1.0), Rate(1.0), Rate(1.0))
    assert hardware._value("matmul_fp8", without, here) == (None, "no such kernels")
    value, _ = hardware._value("matmul_fp8", Rates(*[None] * 7), here)
    assert value == cards.find("4090").matmul_fp8
    assert hardware._value("matmul_fp8", Rates(*[None] * 7), found("Some Card"))[0] is None


@given(*[st.integers(0, 24 * GIB)] * 4)
def test_the_memory_of_a_card_adds_up(free, reserved, outside, others):
    total = free + reserved + outside + others
    now = MemorySnapshot(
        torch.device("cuda", 0), total, free, 0, reserved, 0, reserved, reserved + outside, 64 * GIB, 32 * GIB, GIB
    )
    parts = hardware._memory(now)
    assert parts == {"device_free": free, "torch_reserved": reserved, "outside_torch": outside, "others": others}


# -- devices that are not there ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_is_said_why_and_what_to_do(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for ask in (resolve, device.facts, hardware.measure):
        with pytest.raises(NoDevice, match=r"there is no CUDA device: .* \(CUDA_VISIBLE_DEVICES is ''\)\. Use cpu, or"):
            ask("cuda:1")


def test_other_kinds_of_devices_are_refused_by_name():
    with pytest.raises(NoDevice, match="mps cannot be used"):
        hardware.measure("mps")


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("4060Ti 8 GB", "RTX 4060 Ti 8GB"),
        ("RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_cards_are_found_as_people_and_drivers_write_them(text, name):
    assert cards.find(text).name == name


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.name)
def test_each_card_is_found_by_its_name_and_its_memory_and_is_plausible(card):
    assert cards.find(card.name) == card
    assert cards.find(card.name.rpartition(" ")[0] if card.name.endswith("GB") else card.name, card.vram) == card
    generation, lanes = card.pcie
    assert 0.75 < card.link / ({3: 0.985e9, 4: 1.969e9, 5: 3.938e9}[generation] * lanes) < 0.9
    assert card.attention < card.matmul < card.flops
    assert (card.matmul_fp8 is not None) == (card.capability >= (8, 9))
    assert 20 < card.flops / card.bandwidth < 500, "FLOP a byte: TFLOP/s or GB/s mistyped"


def test_the_memory_that_a_driver_tells_chooses_between_versions():
    assert cards.find("NVIDIA GeForce RTX 4060 Ti", 16_700_000_000).name == "RTX 4060 Ti 16GB"
    assert cards.find("NVIDIA GeForce RTX 4060 Ti", 8_300_000_000).name == "RTX 4060 Ti 8GB"
    assert cards.find("NVIDIA GeForce RTX 4060 Ti").name == "RTX 4060 Ti 8GB"


def test_a_size_that_is_not_sold_is_taken_as_written():
    card = cards.find("RTX 4090 48GB")
    assert card.name == "RTX 4090 48GB"
    assert card.vram == int(48 * GIB * cards.VISIBLE_VRAM)
    assert card.matmul == cards.find("4090").matmul


def test_a_mig_slice_has_its_part_of_the_card():
    whole, part = cards.find("NVIDIA A100-SXM4-80GB"), cards.find("NVIDIA A100-SXM4-80GB MIG 2g.20gb", 20 * GIB)
    assert part.name == "A100 80GB MIG 2g.20gb"
    assert part.vram == int(20 * GIB * cards.VISIBLE_VRAM)
    assert part.matmul == pytest.approx(whole.matmul * 2 / 7)
    assert part.memory == pytest.approx(whole.memory / 4, rel=0.01)
    assert part.link == whole.link


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4091", "Did you mean RTX 4090"),
        ("RTX 5070 Tie", "RTX 5070 Ti"),
        ("Quadro RTX 6000", "RTX A6000"),
        ("RX 7900 XTX", "It knows NVIDIA cards from RTX 2060"),
        ("", "'' is not in the table"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "power limit"),
    ],
)
def test_an_unknown_card_is_refused_with_names_that_are_like_it(text, words):
    for ask in (cards.find, hardware.card):
        with pytest.raises(ValueError, match="give bandwidth and throughput as numbers") as refused:
            ask(text)
        assert words in str(refused.value)


@given(st.text(st.characters(exclude_categories=("Nd", "Nl", "No")), max_size=40))
def test_text_without_a_number_is_no_card(text):
    with pytest.raises(ValueError, match="not in the table"):
        cards.find(text)


@pytest.mark.parametrize("text", ["4090 0gb", "4090 99999999999gb", "NVIDIA A100-SXM4-80GB MIG 9g.0gb"])
def test_sizes_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match="not in the table"):
        cards.find(text)


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        ("NVIDIA GeForce RTX 5090", (16, 0.9)),
        ("NVIDIA GeForce RTX 4090", (16, 0.9)),
        ("NVIDIA GeForce RTX 3090", (12, 0.8)),
        ("NVIDIA GeForce RTX 3060", (8, 0.7)),
        ("", (8, 0.7)),
    ],
)
def test_the_reference_implementations_choice_by_name(name, tuning):
    assert cards.tuning_for(name) == tuning


# -- a card that is not here -------------------------------------------------------------------------------------------


def test_a_card_from_the_table_is_an_empty_card_in_this_machine(cpu):
    card = hardware.card("RTX 4090")
    assert (card.name, card.device, card.capability, card.dtype) == ("RTX 4090", None, (8, 9), "bf16")
    assert card.reachable is card.device_free is card.others is None
    assert 23 * GIB < card.device_total < 24 * GIB
    assert card.outside_torch == hardware.CONTEXT
    assert card.host_total == cpu.host_total
    assert all(card.source[name] == "table: RTX 4090" for name in RATES if name != "calls")
    assert card.source["calls"] == "assumed"


def test_cards_before_8_0_compute_in_fp16_and_before_8_9_have_no_fp8():
    assert hardware.card("T4").dtype == "fp16"
    assert hardware.card("RTX 3090").matmul_fp8 is None
    assert "FP8 linear layers: none (table: RTX 3090)" in hardware.card("RTX 3090").describe()


def test_given_numbers_replace_and_say_so():
    card = hardware.card("RTX 4090")
    other = card.with_(device_total=16 * GIB, to_device=12e9, matmul=card.matmul / 2, memory=None)
    assert (other.device_total, other.to_device, other.to_host) == (16 * GIB, 12e9, 12e9)
    assert other.attention == pytest.approx(card.attention / 2)
    assert other.matmul_fp8 == pytest.approx(card.matmul_fp8 / 2)
    assert other.memory == card.memory
    assert (other.source["to_device"], other.source["to_host"]) == ("given", "given, in proportion")
    assert (other.source["attention"], other.source["memory"]) == ("given, in proportion", "table: RTX 4090")
    assert card.source["to_device"] == "table: RTX 4090"


def test_each_given_number_stands_by_itself():
    card = hardware.card("RTX 4090").with_(matmul=1e14, attention=2e13, to_device=1e10, to_host=2e10)
    assert (card.matmul, card.attention, card.to_device, card.to_host) == (1e14, 2e13, 1e10, 2e10)
    assert card.source["attention"] == card.source["to_host"] == "given"


def test_given_ram_is_free_but_for_what_the_system_needs():
    card = hardware.card("RTX 4090").with_(host_total=32 * GIB)
    assert (card.host_total, card.host_available, card.pinnable) == (32 * GIB, 32 * GIB, 28 * GIB)
    assert card.with_(host_available=20 * GIB).pinnable == 16 * GIB
    assert card.with_(host_total=64 * GIB, pinnable=GIB).pinnable == GIB


def test_given_vram_on_this_machine_is_an_empty_card(cpu):
    assert cpu.with_(device_total=8 * GIB).reachable is None


@pytest.mark.parametrize("number", [0, -1, float("inf"), float("nan")])
def test_numbers_that_cannot_be_are_refused(number):
    with pytest.raises(ValueError, match="to_device must be a number above 0"):
        hardware.card("RTX 4090").with_(to_device=number)


def test_only_numbers_can_be_given():
    with pytest.raises(TypeError, match="name is not a number"):
        hardware.card("RTX 4090").with_(name="faster")


def test_ram_that_may_be_page_locked_is_what_the_arena_allows(cpu):
    host = psutil.virtual_memory()
    free = host_budget.page_lockable(host.total, host.available)
    assert abs(free - host_budget.HostBudget().quota()) < GIB
    assert host_budget.page_lockable(64 * GIB, 3 * GIB) == 0
    assert host_budget.page_lockable(100 * GIB, 50 * GIB) == 40 * GIB
    assert cpu.pinnable == host_budget.page_lockable(cpu.host_total, cpu.host_available)


# -- in words ----------------------------------------------------------------------------------------------------------


def test_a_card_describes_itself_with_numbers_and_sources():
    card = hardware.card("RTX 4090").with_(host_total=32 * GIB)
    assert card.describe() == [
        "device: RTX 4090, not in this machine, compute capability 8.9",
        "VRAM: 23.52 GiB",
        "RAM: 32.00 GiB, 32.00 GiB available, of which 28.00 GiB may be page-locked",
        "page-locked RAM to device: 25.6 GB/s (table: RTX 4090)",
        "device to page-locked RAM: 25.6 GB/s (table: RTX 4090)",
        "bf16 linear layers: 157 TFLOP/s (table: RTX 4090)",
        "FP8 linear layers: 267 TFLOP/s (table: RTX 4090)",
        "bf16 attention, head width 128: 140 TFLOP/s (table: RTX 4090)",
        "elementwise pass over device memory: 857 GB/s (table: RTX 4090)",
        "operations that Python starts: 150 k/s (assumed)",
    ]
    assert "VRAM: 16.00 GiB (given)" in card.with_(device_total=16 * GIB).describe()


def test_a_cpu_describes_itself_without_vram(cpu):
    lines = cpu.describe()
    assert lines[0] == "device: CPU (cpu)"
    assert not any(line.startswith("VRAM") for line in lines)
    assert lines[2].endswith("(measured)")
    assert any(line.startswith("fp32 linear layers") for line in lines)


@pytest.mark.parametrize(
    ("value", "words"),
    [(55.34e9, "55.3 GB/s"), (162.4e12, "162 TB/s"), (999.96e9, "1000 GB/s"), (5e6, "5.0 MB/s"), (12, "12.0 B/s")],
)
def test_rates_are_formatted_as_makers_state_them(value, words):
    assert hardware.format_rate(value, "B/s") == words
