"""What a plan needs to know of a machine, as one value: measured here, or looked up for a card that is elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from . import cards
from .device import (
    ROOM_WANTED,
    DeviceFacts,
    Rate,
    Rates,
    compute_dtype,
    facts,
    measure_rates,
    resolve,
    room,
)
from .host_budget import page_lockable
from .memory import MemorySnapshot, snapshot
from .units import MIB, format_bytes

CONTEXT = 512 * MIB
"""What a process of PyTorch is taken to hold outside torch's allocator on a card that is not here (the CUDA context and
loaded kernels; 0.4 to 0.6 GiB are usual)."""
CALLS = 150_000.0
"""Operations a second that Python is taken to start where that is not measured."""

MEASURED = "measured"
GIVEN = "given"
ASSUMED = "assumed"
IN_PROPORTION = "given, in proportion"
TOO_FULL = "too little free memory to measure"
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_RATES = {
    "to_device": "page-locked RAM to device",
    "to_host": "device to page-locked RAM",
    "matmul": "{dtype} linear layers",
    "matmul_fp8": "FP8 linear layers",
    "attention": "{dtype} attention, head width 128",
    "memory": "elementwise pass over device memory",
    "calls": "operations that Python starts",
}
_UNITS = {"matmul": "FLOP/s", "matmul_fp8": "FLOP/s", "attention": "FLOP/s", "calls": "/s"}
_SIZES = ("device_total", "host_total", "host_available", "pinnable")


class NotMeasurable(RuntimeError):
    """A card's speed can neither be measured now nor looked up."""


@dataclass(frozen=True)
class Hardware:
    """A device and its machine. Sizes are ints in bytes, copies and ``memory`` in bytes/s, products in FLOP/s (a
    multiplication and an addition are two).

    ``device_free``, ``torch_reserved``, ``others`` are None for a card that is not here. The memory of a card that is
    here adds up: ``device_total`` = ``device_free`` + ``torch_reserved`` + ``outside_torch`` + ``others``.
    ``outside_torch`` is what this process holds beside torch's allocator (the CUDA context); where NVML does not tell,
    it is 0, ``others`` includes it, and ``notes`` say so. ``pinnable`` is the RAM that may be page-locked.

    ``to_device`` and ``to_host`` are copies between page-locked RAM and the device; ``matmul`` is a dense linear layer
    of a diffusion transformer's size in ``dtype`` (bf16, fp16 before compute capability 8.0, fp32 on a CPU),
    ``matmul_fp8`` the same by ``torch._scaled_mm`` (None where there are no such kernels), ``attention`` is
    scaled_dot_product_attention over a long sequence at head width 128, ``memory`` is bytes read and written by an
    elementwise pass, ``calls`` operations that Python starts in a second. ``source`` tells in words where each of these comes from: "measured...", "table...", "given...".
    """

    name: str
    device: str | None
    capability: tuple[int, int] | None
    dtype: str
    device_total: int
    device_free: int | None
    torch_reserved: int | None
    outside_torch: int
    others: int | None
    host_total: int
    host_available: int
    pinnable: int
    to_device: float
    to_host: float
    matmul: float
    matmul_fp8: float | None
    attention: float
    memory: float
    calls: float
    source: Mapping[str, str] = field(hash=False)
    notes: tuple[str, ...] = ()

    @property
    def reachable(self) -> int | None:
        """Bytes that this process can use at most, what torch holds included; None for a card that is not here."""
        return None if self.device_free is None else self.device_free + (self.torch_reserved or 0)

    def with_(self, **numbers: int | float | None) -> Hardware:
        """The same with numbers that a user gave; None leaves a value as it is.

        ``device_total``, ``host_total``, ``host_available``, ``pinnable`` in bytes, the rates as above. Of another
        ``device_total`` nothing is taken to be in use. ``host_total`` alone means that all of it is free, and
        ``pinnable`` follows from both. With ``to_device`` alone the link is as fast both ways; with ``matmul`` alone
        FP8 and attention change in proportion. Raises ValueError for a number that is not above 0 and TypeError for a
        name that cannot be given.
        """
        named = {name: number for name, number in numbers.items() if number is not None}
        for name, number in named.items():
            if name not in (*_RATES, *_SIZES):
                raise TypeError(f"{name} is not a number of the hardware that can be given")
            if not 0 < number < float("inf"):
                raise ValueError(f"{name} must be a number above 0, not {number}")
        named |= {name: int(named[name]) for name in _SIZES if name in named}
        follow: dict[str, float | int | None] = {}
        if "device_total" in named:
            follow |= {"device_free": None, "torch_reserved": None, "others": None}
        if "host_total" in named:
            follow["host_available"] = named["host_total"]
        if "host_total" in named or "host_available" in named:
            host = {"host_total": self.host_total, "host_available": self.host_available, **follow, **named}
            follow["pinnable"] = page_lockable(host["host_total"], host["host_available"])
        if "to_device" in named:
            follow["to_host"] = named["to_device"]
        if "matmul" in named:
            scale = named["matmul"] / self.matmul
            follow["attention"] = self.attention * scale
            if self.matmul_fp8 is not None:
                follow["matmul_fp8"] = self.matmul_fp8 * scale
        words = {name: IN_PROPORTION for name in follow if name in _RATES} | dict.fromkeys(named, GIVEN)
        return replace(self, **{**follow, **named, "source": {**self.source, **words}})

    def describe(self) -> list[str]:
        """Lines in plain words for a log or a report: memory that adds up, RAM, speeds, and where each comes from."""
        where = f" ({self.device})" if self.device else ", not in this machine"
        capability = f", compute capability {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        lines = [f"device: {self.name}{where}{capability}"]
        if self.device != "cpu":
            lines.append(self._vram())
        lines.append(
            f"RAM: {format_bytes(self.host_total)}, {format_bytes(self.host_available)} available, of which "
            f"{format_bytes(self.pinnable)} may be page-locked"
        )
        for name, words in _RATES.items():
            unit = _UNITS.get(name, "B/s")
            value = getattr(self, name)
            text = "none" if value is None else format_rate(value, unit)
            lines.append(f"{words.format(dtype=self.dtype)}: {text} ({self.source[name]})")
        return lines + [f"note: {note}" for note in self.notes]

    def _vram(self) -> str:
        total = f"VRAM: {format_bytes(self.device_total)}" + (" (given)" if "device_total" in self.source else "")
        if self.device_free is None:
            return total
        return (
            f"{total} = {format_bytes(self.device_free)} free + {format_bytes(self.torch_reserved)} held by torch here "
            f"+ {format_bytes(self.outside_torch)} by this program beside torch + {format_bytes(self.others)} by others"
        )


def format_rate(value: float, unit: str) -> str:
    """A rate as a person reads it, in powers of ten as makers state it: ``55.3 GB/s``, ``162 TFLOP/s``."""
    scale, letter = next(
        ((s, n) for s, n in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, "")
    )
    return f"{value / scale:.{1 if value < 100 * scale else 0}f} {letter}{unit}"


_rates: dict[torch.device, Rates] = {}
_probing = threading.Lock()


def forget() -> None:
    """Measure again the next time."""
    with _probing:
        _rates.clear()


def rates(device: torch.device | str) -> Rates:
    """``measure_rates`` once a process and device; again where free memory was short then and is not now."""
    device = resolve(device)
    with _probing:
        known = _rates.get(device)
        if known is None or (known.limited and room(device) >= ROOM_WANTED):
            known = _rates[device] = measure_rates(device)
        return known


def measure(device: torch.device | str) -> Hardware:
    """``device`` ("cuda", "cuda:1", "cpu") and this machine. Rates are measured once a process, in at most about a
    second after torch's libraries are loaded; memory is read afresh each time.

    A card that is nearly full is measured with less memory. What does not fit at all, or would be too small to tell, is
    looked up by the card's name, and ``source`` says so. Raises NoDevice where there is no such device and
    NotMeasurable where the memory is full and the card is not in the table.
    """
    device = resolve(device)
    found, here = rates(device), facts(device)
    told = {name: _value(name, found, here) for name in _RATES}
    now = snapshot(device)
    return Hardware(
        name=here.name,
        device=str(device),
        capability=here.capability,
        dtype=_DTYPES[compute_dtype(device.type, here.capability)],
        device_total=now.device_total or here.total_bytes,
        **_memory(now),
        host_total=now.host_total,
        host_available=now.host_available,
        pinnable=page_lockable(now.host_total, now.host_available),
        **{name: value for name, (value, _) in told.items()},
        source={name: words for name, (_, words) in told.items()},
        notes=tuple(f"not known: {reason}" for reason in now.missing),
    )


def _memory(now: MemorySnapshot) -> dict[str, int | None]:
    """What is in use, so that it adds up to the total. The sources are read one after the other, so the driver's total
    and free memory come first, then torch's, and the rest is shared out."""
    if now.device_total is None or now.device_free is None:
        return {"device_free": None, "torch_reserved": now.reserved, "outside_torch": now.outside_torch, "others": None}
    torch_reserved = now.reserved or 0
    rest = max(0, now.device_total - now.device_free - torch_reserved)
    outside = min(now.outside_torch, rest)
    return {
        "device_free": now.device_free,
        "torch_reserved": torch_reserved,
        "outside_torch": outside,
        "others": rest - outside,
    }


def _value(name: str, found: Rates, here: DeviceFacts) -> tuple[float | None, str]:
    """The rate ``name`` and its source: as measured, else by the link, else by the table, else the little there is."""
    rate: Rate | None = getattr(found, name)
    if rate is not None and rate.fair:
        return rate.value, f"{MEASURED}, {rate.note}" if rate.note else MEASURED
    if name == "calls":
        return CALLS, ASSUMED
    if name == "matmul_fp8" and rate is None and found.matmul is not None and found.matmul.fair:
        return None, "no such kernels"
    if name in ("to_device", "to_host") and here.pcie and here.pcie[0] in cards.PCIE_LANE:
        generation, lanes = here.pcie
        return cards.PCIE_LANE[generation] * lanes, f"table: PCIe {generation} x{lanes}; {TOO_FULL}"
    try:
        entry = cards.find(here.name, here.total_bytes)
    except ValueError:
        if rate is not None or name == "matmul_fp8":
            return (rate.value, f"{MEASURED}, {rate.note}, likely more") if rate else (None, TOO_FULL)
        raise NotMeasurable(
            f"{here.name} ({here.device}) has too little free memory to measure its speed, and is not in the table of "
            "cards: close other programs or unload models, or give bandwidth and throughput as numbers"
        ) from None
    return _of_table(entry)[name], f"table: {entry.name}; {TOO_FULL}"


def _of_table(entry: cards.Card) -> dict[str, float | None]:
    return {
        "to_device": entry.link,
        "to_host": entry.link,
        "matmul": entry.matmul,
        "matmul_fp8": entry.matmul_fp8,
        "attention": entry.attention,
        "memory": entry.memory,
    }


def _elsewhere(name: str, capability: tuple[int, int] | None, vram: int, **rest: object) -> Hardware:
    """A card that is not here, in this machine's RAM, with nothing on it."""
    host = snapshot("cpu")
    return Hardware(
        name=name,
        device=None,
        capability=capability,
        dtype=_DTYPES[compute_dtype("cuda", capability)],
        device_total=vram,
        device_free=None,
        torch_reserved=None,
        outside_torch=CONTEXT,
        others=None,
        host_total=host.host_total,
        host_available=host.host_available,
        pinnable=page_lockable(host.host_total, host.host_available),
        **rest,
    )


def card(text: str) -> Hardware:
    """A card by its name ("RTX 4090", "4060 ti 16gb"), as if it were empty and in this machine with its RAM: what its
    maker states and the share of it that is assumed to be reached (see cards.py). Raises ValueError with similar names
    where the table has none."""
    entry = cards.find(text)
    values = _of_table(entry)
    return _elsewhere(
        entry.name,
        entry.capability,
        entry.vram,
        **values,
        calls=CALLS,
        source=dict.fromkeys(values, f"table: {entry.name}") | {"calls": ASSUMED},
    )
