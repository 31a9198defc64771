"""What one swap is doing and how long its forwards took, read by another thread than the one that samples.

Telemetry belongs to the sampling thread. Here it is only looked at: lists are copied, events are asked and stay as they are,
and what changes at that moment is left out.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .plan import Plan
from .swap import Swap
from .telemetry import ForwardRecord

KEPT_STEPS = 32
AHEAD = 4  # forwards that the host may be ahead of the device
RESIDENT, STREAMED, FETCHED, COPYING, COMPUTING = "rsfcx"  # states of a unit, a letter each


@dataclass(frozen=True)
class Step:
    """One forward. Times in seconds, sizes in bytes; ``copying`` is how long the link was busy with its copies.
    ``encoded`` of the streamed bytes became ``decoded`` ones, in ``decoding`` seconds of a stream of their own."""

    index: int
    seconds: float
    stall: float
    streamed: int
    copying: float
    peak: int
    encoded: int = 0
    decoded: int = 0
    decoding: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second that crossed the link while it was busy; 0 where nothing was streamed."""
        return self.streamed / self.copying if self.copying > 0 else 0.0


@dataclass(frozen=True)
class Figures:
    """Medians of several forwards, as the log tells them, and the highest ``peak``. ``link``: bytes a second that the link
    was measured to do, 0 if unknown. ``floor``: what no schedule beats without moving fewer bytes.
    ``encoded``, ``decoded``, ``decoding``: as in Step."""

    forwards: int
    seconds: float
    stall: float
    streamed: float
    rate: float
    link: float
    floor: float
    peak: int
    limit: int
    encoded: float = 0.0
    decoded: float = 0.0
    decoding: float = 0.0


def plan_strip(plan: Plan | None) -> str:
    """Which units of a plan are resident and which are streamed, a letter each."""
    return "".join(RESIDENT if i in plan.resident else STREAMED for i in range(len(plan.units))) if plan else ""


def strip_now(swap: Swap) -> str:
    """The state of each unit at this moment, a letter each."""
    units = list(swap.streamer.units)
    states = [
        RESIDENT if unit.resident is not None else FETCHED if unit.load is not None else STREAMED for unit in units
    ]
    for which, letter in ((_copying(swap), COPYING), (_computing(swap, units), COMPUTING)):
        for index in which:
            if index < len(states):
                states[index] = letter
    return "".join(states)


def _computing(swap: Swap, units: Sequence[Any]) -> list[int]:
    """Units that the device computes now. The host runs ahead of a CUDA device, so that events tell, which only streamed units
    have: between two of them it is one of the resident ones there."""
    recording = next(iter(_under_way(swap)), None)
    if recording is None:
        return []
    if swap.device.type != "cuda":
        order, unit_of = swap.streamer.order, swap.streamer._unit_of
        position, sequence = order.position, order.sequence
        layer = sequence[position - 1] if 0 < position <= len(sequence) else len(unit_of)
        return [unit_of[layer].index] if layer < len(unit_of) else []
    visits = list(recording.visits)
    here = bisect_left(visits, True, key=lambda visit: visit.leave is None or not visit.leave.query())
    if here < len(visits) and visits[here].arrive.query():
        return [visits[here].unit]
    rest = units[visits[here - 1].unit + 1 if here else 0 :]
    return [unit.index for unit in takewhile(lambda unit: unit.resident is not None, rest)]


def _under_way(swap: Swap) -> list[Any]:
    """Recordings of the forwards that the device has not finished, in order. The host may be ahead of it by some."""
    recordings = [*_waiting(swap)[-AHEAD:], swap.telemetry._open]
    return [one for one in recordings if one is not None and (one.end is None or not one.end.query())]


def _waiting(swap: Swap) -> list[Any]:
    """Recordings of forwards that are queued to their end, which the sampling thread has not read yet."""
    try:
        return list(swap.telemetry._finished)
    except RuntimeError:  # it is changing them
        return []


def _copying(swap: Swap) -> list[int]:
    """The unit that is on its way to the device now, if any. Copies are made one after the other."""
    copies = [copy for recording in _under_way(swap) for copy in list(recording.copies)] + list(swap.telemetry._early)
    first = next((copy for copy in copies if not copy.end.query()), None)
    return [first.unit] if first is not None and first.begin.query() else []


def step_of(record: ForwardRecord) -> Step:
    return Step(
        record.index,
        record.seconds,
        record.stall,
        record.streamed_bytes,
        record.copying,
        record.peak_bytes,
        record.encoded_bytes,
        record.decoded_bytes,
        record.decode_seconds,
    )


def read_steps(swap: Swap, steps: dict[int, Step]) -> list[Step]:
    """The last forwards that the device has finished, also those that the sampling thread has not read yet. Those are read from
    events that are its own: what it took up meanwhile is left out. ``steps`` keeps them, by index, for the next time."""
    telemetry = swap.telemetry
    try:
        read = list(telemetry._records)[-KEPT_STEPS:]
    except RuntimeError:  # the sampling thread is changing them
        read = []
    for record in read:
        if record.index not in steps:
            steps[record.index] = step_of(record)
    for recording in _waiting(swap)[-KEPT_STEPS:]:
        if recording.index in steps:
            continue
        step = _peek(recording)
        if step is None or recording not in _waiting(swap):
            break
        steps[recording.index] = step
    for index in sorted(steps)[:-KEPT_STEPS]:
        steps.pop(index, None)
    return [step for _, step in sorted(steps.items())]


def _peek(recording: Any) -> Step | None:
    """A forward from its events, which stay as they are; None while the device is computing it."""
    try:
        if not recording.done():
            return None
        coded = [copy for copy in recording.copies if copy.ready is not None]
        return Step(
            index=recording.index,
            seconds=recording.begin.elapsed_time(recording.end) / 1000,
            stall=sum(visit.arrive.elapsed_time(visit.go) for visit in recording.visits) / 1000,
            streamed=sum(copy.nbytes for copy in recording.copies),
            copying=sum(copy.begin.elapsed_time(copy.end) for copy in recording.copies) / 1000,
            peak=recording.peak,
            encoded=sum(copy.nbytes for copy in coded),
            decoded=sum(copy.plain for copy in coded),
            decoding=sum(copy.decoding.elapsed_time(copy.ready) for copy in coded) / 1000,
        )
    except RuntimeError:  # an event was used again while we looked
        return None


def figures_of(swap: Swap, steps: Sequence[Step]) -> Figures:
    """Medians of ``steps``, of which there is at least one."""
    middle = {
        name: statistics.median(getattr(step, name) for step in steps)
        for name in ("seconds", "stall", "streamed", "rate", "encoded", "decoded", "decoding")
    }
    measured = swap.measured
    known = measured[0].bandwidth if measured is not None and math.isfinite(measured[0].bandwidth) else 0.0
    link = max(known, *(step.rate for step in steps))
    transfer = middle["streamed"] / link if link else 0.0
    floor = max(middle["seconds"] - middle["stall"], transfer)
    return Figures(
        forwards=len(steps),
        **middle,
        link=link,
        floor=min(floor, middle["seconds"]),
        peak=max(step.peak for step in steps),
        limit=swap.limit,
    )


def busy(swap: Swap) -> bool:
    """Whether a forward is under way, on the host or on the device."""
    return swap.computing or bool(_under_way(swap))
