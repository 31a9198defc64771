"""What happened in a forward: time, compute, stall, bytes, peak; read from events without making the host wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .link import Event, Link
from .units import format_bytes


@dataclass
class Copy:
    """One copy of a unit to the device: its events on the copy stream. Of one that is encoded also the ``plain`` bytes that it
    becomes, and when its decoding began and when it was ready."""

    unit: int
    nbytes: int
    begin: Event
    end: Event
    plain: int = 0
    decoding: Event | None = None
    ready: Event | None = None

    @property
    def last(self) -> Event:
        """What is recorded last of it."""
        return self.ready if self.ready is not None else self.end


@dataclass
class Visit:
    """One use of a unit: when compute arrived and when it went on after waiting for the copy, and when it was done."""

    unit: int
    arrive: Event
    go: Event
    leave: Event | None = None


@dataclass(frozen=True)
class Interval:
    """A span on the timeline of a forward, in seconds since it began; copies may begin before (negative)."""

    unit: int
    start: float
    end: float


@dataclass(frozen=True)
class ForwardRecord:
    """One forward as measured. Times in seconds, sizes in bytes. ``compute`` is ``seconds`` less ``stall``.

    ``units`` are the spans in which units computed, ``copies`` those in which units were copied, ``arrivals`` the
    moments at which compute reached each of ``units`` and, if it was not there yet, began to wait. ``streamed_bytes``
    counts the copies that were begun during the forward; ``encoded_bytes`` of them were encoded and became ``decoded_bytes``,
    in ``decode_seconds`` on a stream of their own. ``repeats``: how often it was begun again because memory ran out. ``peak_bytes`` is the highest memory in use during the
    forward as torch's allocator counts it; on a CPU that of the engine's copies of weights. ``host_seconds`` is time spent in the engine's own code.
    """

    index: int
    seconds: float
    stall: float
    streamed_bytes: int
    peak_bytes: int
    host_seconds: float
    misses: int
    units: tuple[Interval, ...]
    copies: tuple[Interval, ...]
    arrivals: tuple[float, ...]
    repeats: int = 0
    decoded_bytes: int = 0
    encoded_bytes: int = 0
    decode_seconds: float = 0.0

    @property
    def compute(self) -> float:
        return self.seconds - self.stall

    @property
    def copying(self) -> float:
        """Seconds in which the link was busy."""
        return sum(copy.end - copy.start for copy in self.copies)

    def describe(self) -> str:
        """One line in plain words, with numbers."""
        return (
            f"forward {self.index}: {self.seconds * 1000:.1f} ms, of which {self.stall * 1000:.1f} ms waiting for copies; "
            f"{format_bytes(self.streamed_bytes)} streamed"
            + (
                f" ({format_bytes(self.encoded_bytes)} encoded, {format_bytes(self.decoded_bytes)} decoded in "
                f"{self.decode_seconds * 1000:.1f} ms)"
                if self.encoded_bytes
                else ""
            )
            + (f", peak {format_bytes(self.peak_bytes)} in use" if self.peak_bytes else "")
            + (f", repeated {self.repeats} times because memory ran out" if self.repeats else "")
        )


class _Recording:
    def __init__(self, index: int, begin: Event, repeats: int) -> None:
        self.index = index
        self.repeats = repeats
        self.begin = begin
        self.end: Event | None = None
        self.visits: list[Visit] = []
        self.copies: list[Copy] = []
        self.peak = 0
        self.host_seconds = 0.0
        self.misses = 0

    def done(self) -> bool:
        return self.end.query() and all(copy.last.query() for copy in self.copies)

    def wait(self) -> None:
        self.end.synchronize()
        for copy in self.copies:
            copy.last.synchronize()


class Telemetry:
    """Records forwards and keeps the last ``keep`` of them. Copies that begin between forwards count to the next."""

    def __init__(self, link: Link, keep: int = 64) -> None:
        self.link = link
        self.forwards = 0
        self._records: deque[ForwardRecord] = deque(maxlen=keep)
        self._open: _Recording | None = None
        self._finished: deque[_Recording] = deque()
        self._early: list[Copy] = []

    @property
    def recording(self) -> bool:
        return self._open is not None

    def begin(self, repeats: int = 0) -> None:
        """A forward begins on the compute stream, after as many that failed."""
        self._open = _Recording(self.forwards, self.link.mark(self.link.compute_stream()), repeats)
        self._open.copies, self._early = self._early, []
        self.forwards += 1

    def end(self, peak: int, host_seconds: float) -> None:
        """The forward has been queued to its end; ``host_seconds`` is what the engine's own code took."""
        recording, self._open = self._open, None
        recording.end = self.link.mark(self.link.compute_stream())
        recording.peak = peak
        recording.host_seconds = host_seconds
        self._finished.append(recording)

    def abandon(self) -> None:
        """The forward broke off: what was recorded of it is dropped."""
        self._open = None

    def copy(self, copy: Copy) -> None:
        """A copy was queued; its events are ours from now on."""
        (self._open.copies if self._open is not None else self._early).append(copy)

    def visit(self, visit: Visit) -> None:
        """A unit began to compute."""
        if self._open is not None:
            self._open.visits.append(visit)

    def miss(self) -> None:
        """A unit was needed that nobody had begun to copy."""
        if self._open is not None:
            self._open.misses += 1

    def records(self, wait: bool = False) -> tuple[ForwardRecord, ...]:
        """The last forwards that the device has finished; with ``wait`` also those it is still computing."""
        while self._finished and (wait or self._finished[0].done()):
            recording = self._finished.popleft()
            recording.wait()
            self._records.append(self._read(recording))
        return tuple(self._records)

    def last(self, wait: bool = False) -> ForwardRecord | None:
        """The newest finished forward, or None before the first."""
        records = self.records(wait)
        return records[-1] if records else None

    def _read(self, recording: _Recording) -> ForwardRecord:
        begin = recording.begin

        def at(event: Event) -> float:
            return begin.elapsed_time(event) / 1000

        units, arrivals, stall = [], [], 0.0
        for visit in recording.visits:
            arrive, go = at(visit.arrive), at(visit.go)
            stall += go - arrive
            if visit.leave is not None:
                units.append(Interval(visit.unit, go, at(visit.leave)))
                arrivals.append(arrive)
            self.link.give_back(visit.arrive)
            self.link.give_back(visit.go)
        copies = tuple(Interval(copy.unit, at(copy.begin), at(copy.end)) for copy in recording.copies)
        coded = [copy for copy in recording.copies if copy.ready is not None]
        decoding = sum(copy.decoding.elapsed_time(copy.ready) for copy in coded) / 1000
        for copy in recording.copies:
            self.link.give_back(copy.begin)
            if copy.ready is not None:
                self.link.give_back(copy.decoding)
        return ForwardRecord(
            index=recording.index,
            seconds=at(recording.end),
            stall=stall,
            streamed_bytes=sum(copy.nbytes for copy in recording.copies),
            peak_bytes=recording.peak,
            host_seconds=recording.host_seconds,
            misses=recording.misses,
            units=tuple(units),
            copies=copies,
            arrivals=tuple(arrivals),
            repeats=recording.repeats,
            decoded_bytes=sum(copy.plain for copy in coded),
            encoded_bytes=sum(copy.nbytes for copy in coded),
            decode_seconds=decoding,
        )

    def clear(self) -> None:
        """Forget everything that is not finished; used when the engine is taken off."""
        self._finished.clear()
        self._early.clear()
        self._open = None
