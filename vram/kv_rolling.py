"""Where rows go in a cache that may be full: pure arithmetic, for a cache that ends, grows or rolls.

The rolling window is that of streaming video models (Self-Forcing, ``wan/modules/causal_model.py``; Krea realtime): the
first ``sink`` rows stay, the oldest rows behind them leave, and rows keep the rotary embedding of the place in the video
that they were made for. Rows are counted from the beginning of the video (absolute) and from the beginning of the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass


class CacheFull(ValueError):
    """Rows do not fit into a cache."""


@dataclass(frozen=True)
class Place:
    """Where ``write`` puts rows: from row ``at`` of the buffer, after which ``length`` rows are valid. Before that,
    ``moved`` rows go from ``source`` to ``target`` because ``evicted`` rows leave."""

    at: int
    length: int
    evicted: int = 0
    source: int = 0
    target: int = 0
    moved: int = 0


def place(start: int, rows: int, length: int, evicted: int, size: int | None, sink: int | None = None) -> Place:
    """Where ``rows`` rows that begin at absolute row ``start`` go in a buffer of ``size`` rows (None: as large as needed),
    of which ``length`` are valid and which ``evicted`` rows have left. ``sink``: rows that never leave; None: none leave.

    Rows up to the end may be written again, as every denoising step of a block of video does. ValueError: a negative
    start, a gap behind the last row, or rows that have left the window. CacheFull: no room.
    """
    end, total = start + rows, length + evicted
    if start < 0:
        raise ValueError(f"rows cannot be written at {start}: lengths are not negative")
    if start > total:
        raise ValueError(f"rows written at {start} leave a gap: the cache ends at {total}")
    stop = length + max(0, end - total)
    leaving = 0 if size is None else max(0, stop - size)
    if leaving and sink is None:
        raise CacheFull(
            f"{rows} rows at {start} do not fit into a cache of max_length {size}, of which {length} are used"
        )
    kept = length - leaving - (sink or 0)
    if leaving and kept < 0:
        raise CacheFull(f"{rows} rows do not fit beside {sink} sink rows into a window of {size}")
    gone = evicted + leaving
    at = start if end <= (sink or 0) else start - gone
    if gone and at != start and at < (sink or 0):
        raise ValueError(f"rows {start} to {end} have left the window, which goes back to row {(sink or 0) + gone}")
    if not leaving:
        return Place(at, stop)
    return Place(at, stop - leaving, leaving, (sink or 0) + leaving, sink or 0, kept)
