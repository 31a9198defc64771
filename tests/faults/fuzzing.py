"""Fuzzing for a time: hypothesis in rounds of other seeds, with a bound on the time and memory of each input.

``FUZZ_SECONDS=3600 python -m pytest tests/faults -k fuzz`` lasts an hour; without it, about 20 seconds in all.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
ROUND = 100  # inputs
SLOWEST = 5.0  # seconds for one input
MOST = 48 << 20  # bytes that one input may take at once


def fuzz(check: Callable[..., None], share: float, **strategies: Any) -> int:
    """Call ``check`` with inputs of ``strategies`` for ``share`` of SECONDS. Returns how many inputs it had; hypothesis
    shrinks and shows the first one that fails, and its seed repeats it."""
    count = 0

    def counted(**inputs: Any) -> None:
        nonlocal count
        count += 1
        check(**inputs)

    profile = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    until = time.monotonic() + share * SECONDS
    turn = 0
    while turn == 0 or time.monotonic() < until:
        seed(turn)(profile(given(**strategies)(counted)))()
        turn += 1
    return count


@contextmanager
def bounded(most: int = MOST, slowest: float = SLOWEST) -> Iterator[None]:
    """What is done inside takes no more than ``most`` bytes of Python's memory and ``slowest`` seconds."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
        seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < slowest, f"took {seconds:.1f} s"
    assert peak < most, f"took {peak / (1 << 20):.0f} MiB"
