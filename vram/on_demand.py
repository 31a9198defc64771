"""When to begin each copy where every load gets memory of its own (layerwise mode).

A forward is divided into windows by the entering and leaving of layers: 2p + 1 inside the p-th layer, 2p before it. The
first forward is run without prefetching and measured: what each window needs beside streamed units. From then on a unit is
copied as early as it fits below what the forward needs anyway, so that prefetching costs no memory at the peak.
"""

from __future__ import annotations

from .link import Link
from .order import Order
from .slots import StreamUnit
from .windows import Use, issue_windows, smallest_cap


class CopySchedule:
    """The windows in which the copies of a forward begin. ``cap``: bytes that streamed units and activations together
    must not pass by prefetching."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.cap: int | None = None
        self.measuring = False
        self._activation: dict[int, int] = {}
        self._windows: list[int] | None = None

    @property
    def known(self) -> bool:
        """Whether there is a schedule; without one nothing is copied ahead."""
        return self._windows is not None

    def forget(self) -> None:
        """The order of use changed, or what a forward needs: measure the next one."""
        self._windows = None

    def begin(self) -> None:
        """A forward begins; it is measured if nothing is known."""
        if self._windows is None:
            self.measuring, self._activation = True, {}
            self.link.reset_memory_peak()

    def measure(self, window: int, taken: int) -> None:
        """``window`` ends, in which streamed units took ``taken`` bytes."""
        used = self.link.memory_peak() - taken
        self._activation[window] = max(self._activation.get(window, 0), used)
        self.link.reset_memory_peak()

    def end(self, order: Order[StreamUnit] | None) -> None:
        """The forward is over. When it was measured and went in ``order``, plan the next; None: it did not."""
        measured, self.measuring = self.measuring, False
        if not measured or order is None:
            return
        windows = 2 * len(order.sequence) + 1
        activation = [self._activation.get(window, 0) for window in range(windows)]
        uses = [Use(run.unit.nbytes, 2 * run.first + 1, 2 * run.last + 1, run.unit.overlap) for run in order.runs]
        cap = smallest_cap(uses, activation)
        self._windows = issue_windows(uses, activation, cap if self.cap is None else min(cap, self.cap))

    def due(self, run: int, window: int) -> bool:
        """Whether the copy of a run may begin in ``window``."""
        return self._windows is not None and self._windows[run] <= window
