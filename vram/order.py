"""In what order units are used: learned from the last forward, followed in the present one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Unit = TypeVar("Unit", bound=Hashable)


@dataclass(frozen=True)
class Run(Generic[Unit]):
    """Consecutive layers of one streamed unit: positions ``first`` to ``last`` (inclusive) of the sequence."""

    unit: Unit
    first: int
    last: int


class Order(Generic[Unit]):
    """The expected sequence of layers and the position in it. Positions count layers that were entered; the order is
    cyclic, because after the last layer of a forward comes the first of the next."""

    def __init__(self) -> None:
        self.sequence: list[int] = []
        self.runs: list[Run[Unit]] = []
        self.position = 0
        self._unit_of: Sequence[Unit] = ()
        self._ends: list[int] = []
        self._uses: dict[Unit | None, list[int]] = {}

    def learn(self, sequence: Sequence[int], unit_of: Sequence[Unit], streamed: set[Unit]) -> None:
        """Expect ``sequence`` of layers from now on; ``unit_of[layer]`` is a layer's unit. Only ``streamed`` units make
        runs."""
        self.sequence = list(sequence)
        self._unit_of = unit_of
        self.position = 0
        self.runs = []
        self._uses = {}
        for position, layer in enumerate(self.sequence):
            unit = unit_of[layer]
            if unit not in streamed:
                continue
            if self.runs and self.runs[-1].unit == unit:
                self.runs[-1] = Run(unit, self.runs[-1].first, position)
            else:
                self._uses.setdefault(unit, []).append(len(self.runs))
                self.runs.append(Run(unit, position, position))
        self._ends = [run.last for run in self.runs]

    def advance(self, layer: int) -> None:
        """``layer`` is entered: move behind it, wherever it comes next in the sequence."""
        count = len(self.sequence)
        if self.position < count and self.sequence[self.position] == layer:
            self.position += 1
            return
        for offset in range(count):
            position = (self.position + offset) % count
            if self.sequence[position] == layer:
                self.position = position + 1
                return

    def next_unit(self) -> Unit | None:
        """The unit of the layer that should come next; None at the end of the forward."""
        if self.position >= len(self.sequence):
            return None
        return self._unit_of[self.sequence[self.position]]

    def here(self) -> int:
        """Index of the first run that is not behind the position; the number of runs at the end of the forward."""
        return bisect_left(self._ends, self.position)

    def distance(self, unit: Unit | None, here: int | None = None) -> int:
        """How many runs ahead ``unit`` is needed next, counted from run ``here`` (the present one); more than there are
        for one that is not expected, or None."""
        uses = self._uses.get(unit)
        if not uses:
            return len(self.runs) + 1
        if here is None:
            here = self.here()
        if len(uses) == 1:
            return (uses[0] - here) % len(self.runs)
        return min((use - here) % len(self.runs) for use in uses)
