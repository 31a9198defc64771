"""Encoded weights that came from a file are compared with their checksums by a few threads, after they were packed and while the
host goes on: a unit is not decoded before its segment is verified, and the first copies take longer than that.

Filling memory is bound by the memory's bandwidth, so verifying meanwhile would lengthen it by what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from .codec import Corrupt
from .encoding import thread_count

if TYPE_CHECKING:
    from .encoded import EncodedTensor
    from .segments import Segment


class Gate:
    """Opens when ``tensors`` are verified. ``futures``: by their positions, of those that another thread verifies."""

    def __init__(self, tensors: Sequence[EncodedTensor] = ()) -> None:
        self.tensors = tensors
        self.futures: dict[int, Future[str | None]] = {}

    def __call__(self) -> None:
        """Wait until all are verified. Raises Corrupt, each time, where one is damaged."""
        for position, tensor in enumerate(self.tensors):
            future = self.futures.get(position)
            damage = _damage(tensor) if future is None or future.cancelled() else future.result()
            if damage is not None:
                raise Corrupt(damage)
        self.tensors = ()


class Verification:
    """Of the segments of one model."""

    def __init__(self) -> None:
        self._gates: dict[int, Gate] = {}

    def begin(self, segments: Sequence[Segment]) -> None:
        """Verify, in their order, what is packed and was not verified yet. What was begun before has ended."""
        waiting = {number: segment.unverified for number, segment in enumerate(segments)}
        self._gates = {number: Gate(tensors) for number, tensors in waiting.items() if tensors}
        if self._gates:
            pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="intelligent-vram-verify")
            try:
                for gate in self._gates.values():
                    for position, tensor in enumerate(gate.tensors):
                        gate.futures[position] = pool.submit(_damage, tensor)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            pool.shutdown(wait=False)  # its threads end when all is verified

    def gate(self, segment: int) -> Gate:
        """That of segment number ``segment``."""
        return self._gates.get(segment) or Gate()

    def end(self) -> None:
        """Nothing is being verified any more. What was not yet, the next ``begin`` takes up."""
        futures = [future for gate in self._gates.values() for future in gate.futures.values()]
        wait([future for future in futures if not future.cancel()])
        self._gates = {}


def _damage(tensor: EncodedTensor) -> str | None:
    """What is wrong with a tensor. In words, because an exception would keep what those who raise it again were doing."""
    try:
        tensor.verify()
    except Corrupt as error:
        return str(error)
    return None
