"""What a device is and what it does in a second: name, compute capability, link; copies and products, measured."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch.nn import functional

from . import nvml
from .host_memory import HostSegment
from .limit import reserved
from .memory import snapshot
from .page_lock import registrar_for
from .units import MIB

HEAD_WIDTH = 128
ROOM_LEFT = 64 * MIB  # of free memory, for the libraries' own workspaces
ROOM_WANTED = 512 * MIB  # what the largest probe takes
LITTLE_MEMORY = "with little free memory"
FP8_CAPABILITY = (8, 9)


class NoDevice(RuntimeError):
    """The device that was asked for is not in this machine, or hidden from this process."""


@dataclass(frozen=True)
class DeviceFacts:
    """A device as found. ``pcie`` is (generation, lanes) of the link now, None where NVML does not tell."""

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    total_bytes: int
    pcie: tuple[int, int] | None


@dataclass(frozen=True)
class Rate:
    """Bytes or FLOP in a second. ``note``: in words what held the measurement back, empty if nothing did. ``fair``:
    False where what was measured is too small to tell how fast a real model's layers are."""

    value: float
    note: str = ""
    fair: bool = True


@dataclass(frozen=True)
class Rates:
    """What ``measure_rates`` found; None where nothing could be measured (no memory; for FP8 also: no such kernels)."""

    to_device: Rate | None
    to_host: Rate | None
    matmul: Rate | None
    matmul_fp8: Rate | None
    attention: Rate | None
    memory: Rate | None
    calls: Rate | None

    @property
    def limited(self) -> bool:
        """Whether a measurement with more free memory would tell more."""
        rates = (getattr(self, field.name) for field in fields(self) if field.name != "matmul_fp8")
        return any(rate is None or rate.note == LITTLE_MEMORY for rate in rates)


def resolve(device: torch.device | str) -> torch.device:
    """``device`` with its index as torch counts, after CUDA_VISIBLE_DEVICES. Raises NoDevice if it is not there."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise NoDevice(f"{device} cannot be used: Intelligent VRAM knows cuda, cuda:<index> and cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is '{visible}')"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        why = (
            "this PyTorch is built without CUDA" if not torch.backends.cuda.is_built() else "no driver or no GPU found"
        )
        raise NoDevice(
            f"there is no CUDA device: {why}{hidden}. Use cpu, or plan for a card by its name, such as 'RTX 4090'"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise NoDevice(f"there is no cuda:{index}: {count} seen, cuda:0 to cuda:{count - 1}{hidden}")
    return torch.device("cuda", index)


def why_not_stream(device: torch.device) -> str | None:
    """Why models on ``device`` are not streamed, in words; None where they are: CUDA devices, which a ROCm build of PyTorch
    calls its own too. Touches no device."""
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        return "the model runs on cpu, where there is no device memory to save"
    name = {"privateuseone": "DirectML", "xpu": "an Intel GPU (xpu)", "mps": "an Apple GPU (mps)"}.get(
        device.type, device.type
    )
    return f"the model runs on {name}, and block swap needs an NVIDIA card (or PyTorch for ROCm): CUDA's streams and page-locked memory"


def facts(device: torch.device | str) -> DeviceFacts:
    """Name, compute capability, memory and link of ``device``; of a MIG slice its own memory. Raises NoDevice."""
    device = resolve(device)
    if device.type != "cuda":
        return DeviceFacts(device, "CPU", None, snapshot(device).host_total, None)
    properties = torch.cuda.get_device_properties(device)
    generation, _ = nvml.ask(device, "nvmlDeviceGetCurrPcieLinkGeneration")
    lanes, _ = nvml.ask(device, "nvmlDeviceGetCurrPcieLinkWidth")
    return DeviceFacts(
        device,
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory,
        (generation, lanes) if generation and lanes else None,
    )


def compute_dtype(device_type: str, capability: tuple[int, int] | None) -> torch.dtype:
    """The dtype that products are measured in: bf16 from compute capability 8.0 on, fp16 before, float32 on a CPU."""
    if device_type == "cpu":
        return torch.float32
    return torch.bfloat16 if capability is None or capability >= (8, 0) else torch.float16


def host_to_device_bandwidth(device: torch.device, size: int = 256 * MIB, repeats: int = 7) -> float:
    """Bytes per second of a copy from page-locked host memory to ``device``: the median of the later half of
    ``repeats`` copies of ``size`` bytes. Takes ``size`` bytes of each memory for a moment and, on PCIe 3 and better,
    under a fifth of a second; measured once a process. On a CPU device it is the speed of a copy in RAM. Raises
    NoDevice."""
    return _copy_bandwidth(resolve(device), size, repeats)


@lru_cache(maxsize=16)
def _copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    with _undisturbed(device), _copy_stream(device):
        return size / _seconds(_copy_work(device, True, size).prepare(), device, repeats)


def measure_rates(device: torch.device | str) -> Rates:
    """Measure how fast ``device`` copies and computes, in at most about a second after its libraries are loaded.

    Sizes grow from small until a run would take too long on this device or would not fit into the memory that is free.
    Products come first, so that a card that was idle has its clocks and its link up when copies are timed. Runs on the
    current stream (copies on one of their own), uses a random generator of its own, sets no flag, and gives the memory
    back, except for cuBLAS's workspace, which the first product of any model makes. Raises NoDevice.
    """
    device = resolve(device)
    capability = facts(device).capability
    if room(device) <= 0:
        return Rates(None, None, None, None, None, None, None)
    dtype = compute_dtype(device.type, capability)
    make = partial(_random, torch.Generator(device).manual_seed(0), device)
    products = ((256, 512, 512), (1024, 1536, 1536), (2048, 3072, 3072), (4096, 5120, 5120), (4096, 13824, 5120))
    with _undisturbed(device):
        matmul = _rate([_linear_work(make, dtype, *shape) for shape in products], device, seconds=0.15)
        fp8 = None
        if capability is not None and capability >= FP8_CAPABILITY:
            with contextlib.suppress(RuntimeError, AttributeError, ValueError):  # a build without these kernels
                fp8 = _rate([_fp8_work(make, *shape) for shape in products], device, seconds=0.08)
        attention = _attention_rate(make, dtype, device, functional.scaled_dot_product_attention)
        memory = _rate([_memory_work(device, size * MIB) for size in (4, 32, 256)], device, seconds=0.04)
        calls = _rate([_calls_work(make, dtype)], device, seconds=0.05)
        with _copy_stream(device):
            links = [
                _rate([_copy_work(device, way, size * MIB) for size in (16, 64)], device, seconds=0.08)
                for way in (True, False)
            ]
    return Rates(*links, matmul, fp8, attention, memory, calls)


@lru_cache(maxsize=16)
def attention_rate(device: torch.device, attend: Callable[..., torch.Tensor]) -> float | None:
    """FLOP/s of ``attend(q, k, v)``, called like scaled_dot_product_attention: hosts choose other kernels than torch does.
    Measured once a process; None where the device is too full."""
    device = resolve(device)
    dtype = compute_dtype(device.type, facts(device).capability)
    make = partial(_random, torch.Generator(device).manual_seed(0), device)
    with _undisturbed(device):
        rate = _attention_rate(make, dtype, device, attend)
    return rate.value if rate is not None else None


# -- what is run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """One size of a probe: what a run does (bytes or FLOP), the device memory it takes, and how to make it."""

    amount: float
    nbytes: int
    prepare: Callable[[], Callable[[], object]]
    fair: bool = True
    note: Callable[[], str] = str


def _random(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Normal values, as weights and activations have: a card that multiplies zeros draws less power and runs faster."""
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _linear_work(make: Callable[..., torch.Tensor], dtype: torch.dtype, tokens: int, out: int, width: int) -> _Work:
    nbytes = dtype.itemsize * (tokens * width + out * width + tokens * out)

    def prepare() -> Callable[[], object]:
        return partial(functional.linear, make(dtype, tokens, width), make(dtype, out, width))

    return _Work(2.0 * tokens * out * width, nbytes, prepare, fair=width >= 3072)


def _fp8_work(make: Callable[..., torch.Tensor], tokens: int, out: int, width: int) -> _Work:
    """The product of hosts' FP8 layers: e4m3 by e4m3 (column-major), one float32 scale each, bf16 out."""
    plain = _linear_work(make, torch.bfloat16, tokens, out, width)

    def prepare() -> Callable[[], object]:
        x, weight = (make(torch.bfloat16, rows, width).to(torch.float8_e4m3fn) for rows in (tokens, out))
        one = torch.ones((), device=x.device)
        return partial(torch._scaled_mm, x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return _Work(plain.amount, plain.nbytes, prepare, plain.fair)


def _attention_rate(
    make: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device, attend: Callable[..., torch.Tensor]
) -> Rate | None:
    sequences = ((2, 256), (8, 1024), (8, 4096), (40, 4096), (40, 8192))
    return _rate([_attention_work(make, dtype, attend, *shape) for shape in sequences], device, seconds=0.12)


def _attention_work(
    make: Callable[..., torch.Tensor], dtype: torch.dtype, attend: Callable[..., torch.Tensor], heads: int, tokens: int
) -> _Work:
    """Two products of 2 * tokens^2 * width FLOP for each head; the softmax is not counted, as is usual."""

    def prepare() -> Callable[[], object]:
        return partial(attend, *(make(dtype, 1, heads, tokens, HEAD_WIDTH) for _ in range(3)))

    nbytes = 4 * dtype.itemsize * heads * tokens * HEAD_WIDTH
    return _Work(4.0 * heads * tokens**2 * HEAD_WIDTH, nbytes, prepare, fair=tokens >= 4096)


def _memory_work(device: torch.device, size: int) -> _Work:
    """Read ``size`` bytes and write as many. Only what is well beyond any second-level cache (to 128 MiB) is fair."""

    def prepare() -> Callable[[], object]:
        source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        return partial(torch.mul, source, 0.5, out=torch.empty_like(source))

    return _Work(2.0 * size, 2 * size, prepare, fair=size >= 256 * MIB)


def _calls_work(make: Callable[..., torch.Tensor], dtype: torch.dtype) -> _Work:
    """Operations on tensors so small that starting them is all the work: what the host's Python does for each."""
    rounds = 64

    def prepare() -> Callable[[], object]:
        x, weight = make(dtype, 16, 64), make(dtype, 64, 64)

        def run() -> None:
            y = x
            for _ in range(rounds):
                y = functional.layer_norm(functional.linear(y, weight), (64,)) * 0.5 + x

        return run

    return _Work(4.0 * rounds, 1 << 16, prepare)


def _copy_work(device: torch.device, to_device: bool, size: int) -> _Work:
    refused: list[str] = []

    def prepare() -> Callable[[], object]:
        host, card = HostSegment(size), torch.empty(size, dtype=torch.uint8, device=device)
        host.buffer.fill_(1)
        if device.type == "cuda" and not host.page_lock(registrar_for(device)):
            refused.append("the driver refused to page-lock RAM")

        def copy() -> None:  # holds the segment too: it is page-locked as long as it lives
            source, target = (host.buffer, card) if to_device else (card, host.buffer)
            target.copy_(source, non_blocking=True)

        return copy

    return _Work(float(size), size, prepare, note=lambda: "".join(refused[:1]))


# -- how it is timed ---------------------------------------------------------------------------------------------------


def _rate(works: Sequence[_Work], device: torch.device, seconds: float) -> Rate | None:
    """The rate at the largest of ``works`` (in ascending order) that fits into free memory and, about six times, into
    ``seconds``; None if not even the smallest fits into memory. On a device that is slow, small work is fair."""
    chosen: _Work | None = None
    value, sure, note = 0.0, False, ""

    def again() -> float:
        """From more than the two runs, of which one may have waited for something."""
        return _try(chosen, device, repeats=int(min(60, max(3, seconds * value / chosen.amount)))) or value

    for work in works:
        if chosen is not None and 6 * work.amount > seconds * value:
            value, sure = again(), True
            if 6 * work.amount > seconds * value:
                break
        tried = _try(work, device, repeats=2)
        if tried is None:
            note = LITTLE_MEMORY
            break
        chosen, value, sure = work, tried, False
    if chosen is None:
        return None
    return Rate(value if sure else again(), chosen.note() or note, chosen.fair or not note)


def _try(work: _Work, device: torch.device, repeats: int) -> float | None:
    """The rate of ``work`` in ``repeats`` runs, or None where there is no memory for it."""
    if work.nbytes > room(device):
        return None
    try:
        return work.amount / _seconds(work.prepare(), device, repeats)
    except RuntimeError as error:
        if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return None
        raise


def room(device: torch.device) -> int:
    """Bytes that a probe may take: what is free on the device or cached by torch, less 64 MiB for the libraries; 0 if
    the device is so full that this process cannot even begin to use it."""
    if device.type != "cuda":
        return snapshot(device).host_available - ROOM_LEFT
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return 0
    return free + reserved(device) - torch.cuda.memory_allocated(device) - ROOM_LEFT


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of a run, after one that is not counted: the median of the later half of ``repeats`` on a CUDA device,
    the least on a CPU, which has other things to do."""
    run()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record(stream)
        for event in events[1:]:
            run()
            event.record(stream)
        events[-1].synchronize()
        spans = [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]
        return max(statistics.median(spans[repeats // 2 :]), 1e-9)
    times = [time.perf_counter()]
    for _ in range(repeats):
        run()
        times.append(time.perf_counter())
    return max(min(after - before for before, after in pairwise(times)), 1e-9)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Outside the caller's autocast and autograd; what torch's allocator took meanwhile is given back."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = reserved(device)
        try:
            with torch.cuda.device(device):
                yield
        finally:
            if reserved(device) > before:
                torch.cuda.empty_cache()


def _copy_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A stream of its own, so that copies do not wait for what others compute. Memory made inside belongs to it."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
