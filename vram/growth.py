"""Growth watch: what grows from frame to frame or from run to run, by how much, of which shape, and what holds it.

>>> watch = GrowthWatch("cuda", unit="frame")
>>> for _ in range(30):
...     state = pipe(state=state)
...     watch.mark()
>>> print("\\n".join(watch.growth().report()))

On a GPU a mark reads counters, in well under a millisecond, and looks at all tensors (growth_scan.py) only where a counter
stands above where it stood at the last look.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .allocation_sites import sites
from .device import resolve
from .growth_scan import Kind, Scan, holders, samples, scan
from .memory import snapshot
from .units import MIB, format_bytes

RAM_NOISE = MIB  # bytes by which a process grows and shrinks without a reason that tensors tell
RAM_STEP = 4 * MIB  # what RAM has to grow by from each third of the marks to the next, to count
LEAST = 3  # marks after those to warm up, below which nothing can be told
MOST_MARKS = 4096
MOST_KINDS = 6
ALLOCATED, RESERVED, RAM, LIVE = "VRAM in use", "VRAM reserved", "RAM of this process", "Live tensors"


@dataclass(frozen=True)
class Mark:
    """Counters at the end of a frame or run, in bytes. ``allocated`` and ``reserved`` are torch's allocator on the device,
    None on a CPU; ``live`` the storages of all tensors that Python knew when they were last ``scanned``."""

    number: int
    label: str
    allocated: int | None
    reserved: int | None
    rss: int
    live: int
    scanned: bool


@dataclass(frozen=True)
class Counter:
    """One counter from the mark after the warm-up to the last, in bytes. ``grows``: None where there are too few marks."""

    name: str
    first: int
    last: int
    per_mark: float
    grows: bool | None


@dataclass(frozen=True)
class GrownKind:
    """Tensors of a kind that there are more of: how many storages, their bytes, what holds them, where they were made."""

    kind: Kind
    count: int
    nbytes: int
    holders: tuple[str, ...]
    sites: tuple[str, ...]

    def describe(self) -> tuple[str, str]:
        """In plain words: what grew, and what holds it and made it."""
        held = f"held by {' and '.join(self.holders)}" if self.holders else "held by no object that Python tracks"
        made = f", made at {' and '.join(self.sites)}" if self.sites else ""
        return f"{format_bytes(self.nbytes)} in {self.count:+d} tensors {self.kind}", held + made


@dataclass(frozen=True)
class Growth:
    """What a watch saw. ``unseen``: bytes of VRAM in use, more than at the start, that no tensor known to Python accounts for."""

    device: str
    unit: str
    marks: tuple[Mark, ...]
    warm_up: int
    counters: tuple[Counter, ...]
    kinds: tuple[GrownKind, ...]
    unseen: int

    @property
    def grows(self) -> bool | None:
        """Whether any counter grows; None where there are too few marks to tell."""
        verdicts = [counter.grows for counter in self.counters]
        return None if None in verdicts or not verdicts else any(verdicts)

    def verdict(self) -> str:
        """In a sentence."""
        seen = max(0, len(self.marks) - self.warm_up)
        if self.grows is None:
            return f"Too few {self.unit}s to tell: {seen} after {self.warm_up} to warm up, at least {LEAST} are needed"
        names = [counter.name for counter in self.counters if counter.grows]
        return f"Memory grows: {', '.join(names)}" if names else f"No growth over {seen} {self.unit}s"

    def report(self) -> list[str]:
        """Lines in plain words: the verdict, the counters, and what grew."""
        lines = [f"{self.verdict()} ({self.device})"]
        for counter in self.counters:
            change = counter.last - counter.first
            lines.append(
                f"{counter.name}: {format_bytes(counter.last)}, {signed(change)} since "
                f"{self.unit} {self.warm_up + 1}, {signed(counter.per_mark)} a {self.unit}"
                + ("; grows" if counter.grows else "")
            )
        lines += [f"Grown: {', '.join(kind.describe())}" for kind in self.kinds]
        if self.unseen > 0 and self.counters and self.counters[0].grows:
            lines.append(
                f"Outside the tensors that Python knows (gradients, graph pools, workspaces): {signed(self.unseen)}"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, sizes in bytes."""
        return {
            "grows": self.grows,
            "device": self.device,
            "unit": self.unit,
            "warm_up": self.warm_up,
            "marks": [vars(mark) for mark in self.marks],
            "counters": [vars(counter) for counter in self.counters],
            "grown": [{**vars(kind), "kind": vars(kind.kind)} for kind in self.kinds],
            "unseen": self.unseen,
        }


class GrowthWatch:
    """Watches memory from mark to mark.

    Args:
        device: whose memory; by default the first CUDA device, else the CPU.
        unit: what lies between two marks, in one word: "run", "frame".
        warm_up: marks to pass over at the start: first calls load and cache.
        always: look at all tensors at each mark, and not only where counters grew; by default on a CPU, where no counter
            tells of tensors that fit into memory which the process has already.
        where: record which line allocates (allocation_sites.py) between entering and leaving the watch as a context manager.
    Raises ValueError for a negative ``warm_up``, NoDevice (device.py) for a device that is not there.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        unit: str = "run",
        warm_up: int = 1,
        always: bool | None = None,
        where: bool = False,
    ) -> None:
        if warm_up < 0:
            raise ValueError(f"warm_up is {warm_up}; it counts marks")
        self.device = resolve(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.unit, self.warm_up = unit, warm_up
        self.always = self.device.type == "cpu" if always is None else always
        self.count = 0
        self._marks: list[Mark] = []
        self._first: Scan | None = None  # at the first mark after the warm-up
        self._last: Scan | None = None
        self._looked: Mark | None = None
        self._sites = sites(self.device) if where else None

    def __enter__(self) -> GrowthWatch:
        if self._sites is not None:
            self._sites.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sites is not None:
            self._sites.stop()
            self._sites = None

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All marks so far; of more than MOST_MARKS every second one of the older ones is let go."""
        return tuple(self._marks)

    def mark(self, label: str = "") -> Mark:
        """The end of a frame or run."""
        memory = snapshot(self.device)
        counters = (memory.allocated, memory.reserved, memory.process_rss)
        baseline = self.count == self.warm_up
        looks = self.always or baseline or self._looked is None or self._grew(*counters)
        if looks:
            self._last = scan()
            self._first = self._last if baseline else self._first
        mark = Mark(self.count, label, *counters, self._last.nbytes, looks)
        self._looked = mark if looks else self._looked
        self.count += 1
        self._marks.append(mark)
        if len(self._marks) > MOST_MARKS:
            kept = self.warm_up + 1
            self._marks[kept:-1] = self._marks[kept:-1:2]
        return mark

    def _grew(self, allocated: int | None, reserved: int | None, rss: int) -> bool:
        before = self._looked
        pairs = ((allocated, before.allocated), (reserved, before.reserved), (rss - RAM_NOISE, before.rss))
        return any(now is not None and now > then for now, then in pairs)

    def growth(self, most: int = MOST_KINDS) -> Growth:
        """What grew from the first mark after the warm-up to the last one, with the ``most`` largest kinds of tensors, as
        long as these are alive. Takes some tenths of a second where there are many objects."""
        marks = self._marks[self.warm_up :]
        counters: list[Counter] = []
        if marks:
            columns = {
                ALLOCATED: [mark.allocated for mark in marks],
                RESERVED: [mark.reserved for mark in marks],
                LIVE: [mark.live for mark in marks],
                RAM: [mark.rss for mark in marks],
            }
            span = max(1, marks[-1].number - marks[0].number)
            for name, values in columns.items():
                if None not in values:
                    verdict = grows(values, RAM_STEP if name == RAM else 1)
                    counters.append(Counter(name, values[0], values[-1], (values[-1] - values[0]) / span, verdict))
        return Growth(
            device=str(self.device),
            unit=self.unit,
            marks=tuple(self._marks),
            warm_up=self.warm_up,
            counters=tuple(counters),
            kinds=self._grown_kinds(most),
            unseen=self._unseen(marks),
        )

    def _grown_kinds(self, most: int) -> tuple[GrownKind, ...]:
        if self._first is None or self._last is self._first:
            return ()
        changes: list[tuple[int, int, Kind]] = []
        for kind, (count, nbytes) in self._last.kinds.items():
            count_before, before = self._first.kinds.get(kind, (0, 0))
            if nbytes > before:
                changes.append((nbytes - before, count - count_before, kind))
        changes.sort(key=lambda change: -change[0])
        tensors, found = samples([kind for *_, kind in changes[:most]], self._first.keys)
        named = list(zip(found, holders(tensors), self._lines(tensors), strict=True))
        return tuple(
            GrownKind(
                kind,
                count,
                nbytes,
                _most_common(holder for example, holder, _ in named if example == kind),
                _most_common(line for example, _, line in named if example == kind),
            )
            for nbytes, count, kind in changes[:most]
        )

    def _lines(self, tensors: Sequence[torch.Tensor]) -> list[str | None]:
        return self._sites.lines(tensors) if self._sites is not None and tensors else [None] * len(tensors)

    def _unseen(self, marks: Sequence[Mark]) -> int:
        scanned = [mark for mark in marks if mark.scanned and mark.allocated is not None]
        if not scanned or self._first is None:
            return 0
        device = str(self.device)
        return scanned[-1].allocated - scanned[0].allocated - (self._last.on(device) - self._first.on(device))


def grows(values: Sequence[int], step: int = 1) -> bool | None:
    """Whether a counter grows and goes on growing: the least of each third of its values is above the least of the third
    before by ``step`` or more. What goes up once, or up and down, does not grow. None for fewer than LEAST values."""
    if len(values) < LEAST:
        return None
    edges = [len(values) * third // 3 for third in range(4)]
    least = [min(values[first:end]) for first, end in pairwise(edges)]
    return all(after - before >= step for before, after in pairwise(least))


def signed(size: float) -> str:
    """A change in bytes with its sign: ``+3.0 MiB``."""
    return f"{'+' if size >= 0 else ''}{format_bytes(size)}"


def _most_common(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(name for name, _ in Tally(name for name in names if name).most_common(2))
