"""What block swap is doing now and what its last runs were like, as plain numbers for a panel.

Swaps are known by weak reference and are only read. The thread that samples never waits for a reader: what it is writing
at the same moment is left out of that reading and told in the next one.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .live_swap import Figures, Step, busy, figures_of, plan_strip, read_steps, step_of, strip_now
from .memory import MemorySnapshot, snapshot
from .swap import Swap

KEPT_RUNS = 20
KEPT_NODES = 256
MEMORY_EVERY = 0.5  # seconds; asking the driver and the system takes longer than all the rest
STALL, SLOW, FULL, OTHERS = 0.1, 0.7, 0.8, 0.2  # shares from which on, or below which, a warning is due


@dataclass(frozen=True)
class Run:
    """One sampling that is over. ``node`` and ``prompt`` are the host's ids, ``when`` seconds since 1970. ``strip``: the state
    of each unit."""

    model: str
    node: str | None
    prompt: str | None
    device: str
    when: float
    strip: str
    figures: Figures


@dataclass
class _Watched:
    swap: weakref.ref[Swap]
    number: int
    model: str
    node: str | None
    told: int = 0  # the first forward that no run has counted yet
    steps: dict[int, Step] = field(default_factory=dict)  # the last ones that were read, by index


_lock = threading.Lock()
_watched: list[_Watched] = []
_runs: deque[dict[str, Any]] = deque(maxlen=KEPT_RUNS)
_nodes: OrderedDict[str, dict[str, Any]] = OrderedDict()
_memory: dict[torch.device, tuple[float, MemorySnapshot]] = {}
_number = 0


def watch(swap: Swap, node: str | None = None) -> None:
    """Show ``swap`` for as long as it lives; ``node`` is the host's id of the node that asked for it."""
    global _number
    with _lock:
        _watched[:] = [known for known in _watched if known.swap() is not None]
        known = next((known for known in _watched if known.swap() is swap), None)
        if known is not None:
            known.node = node
            return
        _number += 1
        _watched.append(_Watched(weakref.ref(swap), _number, type(swap.root).__name__, node))


def finished(swap: Swap, prompt: str | None = None) -> None:
    """A sampling with ``swap`` is over: keep what it was like. Called by the thread that samples, which may read telemetry.
    Does nothing where no forward was finished since the last time."""
    known = next((known for known in list(_watched) if known.swap() is swap), None)
    if known is None or swap.plan is None:
        return
    steps = [step_of(record) for record in swap.telemetry.records() if record.index >= known.told]
    if not steps:
        return
    known.told = steps[-1].index + 1
    run = Run(
        model=known.model,
        node=known.node,
        prompt=prompt,
        device=str(swap.device),
        when=time.time(),
        strip=plan_strip(swap.plan),
        figures=figures_of(swap, steps),
    )
    with _lock:
        _runs.append(asdict(run))
        if run.node is not None:
            _nodes.pop(run.node, None)
            _nodes[run.node] = of_node(run.strip, run.figures)
            while len(_nodes) > KEPT_NODES:
                _nodes.popitem(last=False)


def computing() -> bool:
    """Whether a forward of any swap is under way."""
    return any(busy(swap) for _, swap in _attached())


def nodes() -> dict[str, dict[str, Any]]:
    """By node id, what a node shows of its last run, or of the one that is under way. Of several swaps that one node asked
    for, on several devices, it shows one that computes."""
    with _lock:
        shown = dict(_nodes)
    for known, swap in sorted(_attached(), key=lambda pair: busy(pair[1])):
        if known.node is None:
            continue
        steps = [step for step in read_steps(swap, known.steps) if step.index >= known.told]
        if steps:
            shown[known.node] = of_node(plan_strip(swap.plan), figures_of(swap, steps), True)
        elif known.node not in shown or busy(swap):
            shown[known.node] = of_node(plan_strip(swap.plan), None, busy(swap))
    return shown


def state(default: torch.device | str = "cpu") -> dict[str, Any]:
    """All that the panel shows: RAM, each device in use (``default`` where no model is), history, warnings. Sizes in bytes,
    times in seconds."""
    attached = _attached()
    places = list(dict.fromkeys(swap.device for _, swap in attached)) or [torch.device(default)]
    devices = [_device(place, [pair for pair in attached if pair[1].device == place]) for place in places]
    ram = _ram([swap for _, swap in attached])
    with _lock:
        runs = list(reversed(_runs))
    return {"ram": ram, "devices": devices, "runs": runs, "warnings": warnings(ram, devices)}


def warnings(ram: dict[str, Any], devices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a user should know and can do something about, by name and with its numbers. ``share`` is of what the name says:
    of RAM, of the card, of a step's time, of the link's measured speed."""
    found: list[dict[str, Any]] = []

    def add(what: str, **numbers: Any) -> None:
        found.append({"what": what, **numbers})

    used = 1 - ram["free"] / ram["total"]
    if used >= FULL:
        add("ram_full", share=used)
    for device in devices:
        where, total = device["device"], device["total"]
        if not device["host"] and total:
            if 1 - device["free"] / total >= FULL:
                add("card_full", device=where, share=1 - device["free"] / total)
            if device["models"] and device["others"] / total >= OTHERS:
                add("others", device=where, share=device["others"] / total, bytes=device["others"])
        for model in device["models"]:
            if model["unlocked"]:
                add("unlocked", device=where, model=model["number"], bytes=model["unlocked"])
            if model["repeated"]:
                add("repeated", device=where, model=model["number"], count=model["repeated"])
            step = model["figures"]
            if step is None:
                continue
            if step["seconds"] and step["stall"] / step["seconds"] >= STALL:
                add("stall", device=where, model=model["number"], share=step["stall"] / step["seconds"])
            if not device["host"] and 0 < step["rate"] < SLOW * step["link"]:
                add("slow_link", device=where, model=model["number"], share=step["rate"] / step["link"])
    return found


def _attached() -> list[tuple[_Watched, Swap]]:
    pairs = [(known, known.swap()) for known in list(_watched)]
    return [(known, swap) for known, swap in pairs if swap is not None and swap.attached]


# -- memory ------------------------------------------------------------------------------------------------------------


def _snapshot(device: torch.device) -> MemorySnapshot:
    when, known = _memory.get(device, (-math.inf, None))
    now = time.monotonic()
    if known is None or now - when >= MEMORY_EVERY:
        known = snapshot(device)
        _memory[device] = (now, known)
    return known


def _ram(swaps: Sequence[Swap]) -> dict[str, Any]:
    """RAM by use: ``packed`` weights of attached models, of which ``locked`` page-locked; the ``process`` besides."""
    now = _snapshot(torch.device("cpu"))
    packed = [found for swap in swaps if (found := swap.packed) is not None]
    weights = sum(found.host_bytes for found in packed)
    used = now.host_total - now.host_available
    process = max(0, min(now.process_rss, used) - weights)
    return {
        "total": now.host_total,
        "free": now.host_available,
        "packed": weights,
        "locked": sum(found.arena.page_locked_bytes for found in packed),
        "process": process,
        "others": max(0, used - weights - process),
    }


def _device(device: torch.device, attached: Sequence[tuple[_Watched, Swap]]) -> dict[str, Any]:
    """A device's memory by use, and the models on it. ``beside``: weights that are not in units, ``rest``: activations and
    all else of this process. Where the CPU is the device (``host``) there is no card, and ``total`` is the limit."""
    models = [_model(known, swap) for known, swap in attached]
    resident = sum(model["resident"] for model in models)
    slots = sum(model["slots"] for model in models)
    beside = sum(model["beside"] for model in models)
    weights = resident + slots + beside
    limit = max((swap.limit for _, swap in attached), default=None)
    if device.type != "cuda":
        total = max(limit or 0, weights)
        free, others, rest, name = total - weights, 0, 0, device.type.upper()
    else:
        now = _snapshot(device)
        total, free = now.device_total or 0, now.device_free or 0
        process = max(weights, (now.reserved or 0) + now.outside_torch)
        others, rest = max(0, total - free - process), process - weights
        name = torch.cuda.get_device_name(device)
        if torch.cuda.device_count() > 1:  # cards of one machine are often of one kind
            name = f"{name} ({device})"
    return {
        "device": str(device),
        "name": name,
        "host": device.type != "cuda",
        "total": total,
        "free": free,
        "resident": resident,
        "slots": slots,
        "beside": beside,
        "rest": rest,
        "others": others,
        "limit": limit,
        "models": models,
    }


# -- models ------------------------------------------------------------------------------------------------------------


def _model(known: _Watched, swap: Swap) -> dict[str, Any]:
    units, packed = list(swap.streamer.units), swap.packed
    resident = sum(unit.nbytes for unit in units if unit.resident is not None)
    steps = read_steps(swap, known.steps)
    current = [step for step in steps if step.index >= known.told] or steps
    locked = packed.arena.page_locked_bytes if packed is not None else 0
    return {
        "number": known.number,
        "model": known.model,
        "node": known.node,
        "mode": swap.config.mode,
        "computing": busy(swap),
        "forwards": swap.telemetry.forwards,
        "limit": swap.limit,
        "resident": resident,
        "slots": max(0, swap.streamer.device_bytes - resident),
        "beside": swap.rest_bytes,
        "unlocked": max(0, packed.host_bytes - locked) if packed is not None and swap.device.type == "cuda" else 0,
        "repeated": swap.repeated,
        "blocks": [-1 if unit.block is None else unit.block for unit in swap.plan.units] if swap.plan else [],
        "strip": strip_now(swap),
        "planned": plan_strip(swap.plan),
        "steps": [round(step.seconds, 6) for step in steps],
        "figures": asdict(figures_of(swap, current[-1:])) if current else None,
    }


def of_node(strip: str, figures: Figures | None, running: bool = False) -> dict[str, Any]:
    """What a node shows."""
    return {"strip": strip, "running": running, "figures": asdict(figures) if figures is not None else None}
