"""Encoded weights that came from a file are compared with their checksums by a few threads, after they were packed and while the
host goes on: a unit is not decoded before its segment is verified, and the first copies take longer than that.

Filling memory is bound by the memory's bandwidth, so verifying meanwhile would lengthen it by what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING

from .encoding import thread_count

if TYPE_CHECKING:
    from .encoded import EncodedTensor
    from .segments import Segment


class Verification:
    """Of the segments of one model."""

    def __init__(self) -> None:
        self._found: dict[int, Future[None]] = {}

    def begin(self, segments: Sequence[Segment]) -> None:
        """Verify, in their order, what is packed and was not verified yet. What was begun before has ended."""
        waiting = {number: some for number, segment in enumerate(segments) if (some := segment.unverified)}
        self._found = {}
        if waiting:
            pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="intelligent-vram-verify")
            try:
                for number, some in waiting.items():
                    self._found[number] = pool.submit(_verify, some)
            finally:
                pool.shutdown(wait=False)  # its threads end when all is verified

    def of(self, segment: int) -> Callable[[], object]:
        """What waits until segment number ``segment`` is verified, and raises Corrupt if it is damaged."""
        return partial(_result, self._found.get(segment))

    def end(self, cancel: bool = False) -> None:
        """Wait until nothing is being verified. ``cancel``: what was not begun is not; the next ``begin`` takes it up."""
        if cancel:
            for future in self._found.values():
                future.cancel()
        wait(self._found.values())


def _verify(tensors: Sequence[EncodedTensor]) -> None:
    for tensor in tensors:
        tensor.verify()


def _result(future: Future[None] | None) -> None:
    if future is not None:
        future.result()
