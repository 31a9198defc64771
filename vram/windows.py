"""When to begin copying streamed units into memory on demand: pure functions over the windows of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """A streamed unit's stay in a forward: needed from window ``first`` to window ``last`` (inclusive). ``overlap``:
    its copy is to be hidden behind the unit before it, also where that raises the least memory."""

    nbytes: int
    first: int
    last: int
    overlap: bool = True


def smallest_cap(uses: Sequence[Use], activation: Sequence[int]) -> int:
    """The least device memory in bytes in which each unit is there when needed, and those with ``overlap`` can be copied
    while the unit before them computes. ``activation[w]`` is what window ``w`` needs beside streamed units."""
    cap = max(activation, default=0)
    for index, use in enumerate(uses):
        for window in range(use.first, use.last + 1):
            cap = max(cap, activation[window] + use.nbytes)
        if index and use.overlap:
            cap = max(cap, activation[uses[index - 1].last] + uses[index - 1].nbytes + use.nbytes)
    return cap


def issue_windows(uses: Sequence[Use], activation: Sequence[int], cap: int) -> list[int]:
    """When to begin copying each unit of a forward: the earliest window from which it fits under ``cap`` bytes until it
    is used, in order of use. Where it never fits earlier, at its first use. Pure greedy, O(uses x windows)."""
    occupied = list(activation)
    windows: list[int] = []
    for use in uses:
        earliest = use.first
        while earliest > (windows[-1] if windows else 0) and occupied[earliest - 1] + use.nbytes <= cap:
            earliest -= 1
        for window in range(earliest, use.last + 1):
            occupied[window] += use.nbytes
        windows.append(earliest)
    return windows
