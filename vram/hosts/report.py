"""One line in the host's log about a run, in plain words."""

from __future__ import annotations

import logging
import statistics

from .. import last_runs
from ..swap import Swap
from ..units import format_bytes

log = logging.getLogger(__name__)


def report(swap: Swap, since: int) -> int:
    """Log what the forwards of ``swap`` from number ``since`` on were like, and keep it for planning. Returns the number of the
    next one."""
    records = [record for record in swap.telemetry.records(wait=True) if record.index >= since]
    if not records:
        return since
    seconds = statistics.median(record.seconds for record in records)
    stall = statistics.median(record.stall for record in records)
    streamed = statistics.median(record.streamed_bytes for record in records)
    encoded = statistics.median(record.encoded_bytes for record in records)
    decoding = statistics.median(record.decode_seconds for record in records)
    peak = max(record.peak_bytes for record in records)
    repeated = sum(record.repeats > 0 for record in records)
    log.info(
        "block swap: %d forwards, median %.0f ms, of which %.0f ms waited for copies; %s streamed in each%s%s; %s%s",
        len(records),
        seconds * 1000,
        stall * 1000,
        format_bytes(streamed),
        f" (of which {format_bytes(encoded)} decoded in {decoding * 1000:.1f} ms)" if encoded else "",
        f", peak {format_bytes(peak)} of {format_bytes(swap.limit)}" if peak else "",
        swap.plan.describe(),
        f"; {repeated} of them were repeated, because memory ran out" if repeated else "",
    )
    last_runs.note(swap)
    return records[-1].index + 1
