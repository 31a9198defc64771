"""How bytes get to the device: the copy stream of a CUDA device, or plain copies where the CPU is the device."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Protocol

import torch


class Event(Protocol):
    """A point on a stream, as torch.cuda.Event has it."""

    def record(self, stream: object = None) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float: ...


class Moment:
    """A point in time on a CPU, with the interface of torch.cuda.Event."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: Moment) -> float:
        """Milliseconds from this moment to ``other``."""
        return (other.seconds - self.seconds) * 1000


class Link:
    """Copies to a device and the ordering between copies and compute. This one serves a CPU: all is synchronous."""

    stream: object = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[Event] = []

    def compute_stream(self) -> object:
        """The stream that the calling thread computes on."""
        return None

    def computing_on(self, stream: object) -> contextlib.AbstractContextManager:
        """While inside, ``stream`` is the stream that the calling thread computes on."""
        return contextlib.nullcontext()

    def mark(self, stream: object) -> Event:
        """An event with a time, recorded on ``stream`` now."""
        event = self.event()
        event.record(stream)
        return event

    def event(self) -> Event:
        """An event that is yet to be recorded: one that was given back, or a new one."""
        return self._events.pop() if self._events else self._new_event()

    def give_back(self, event: Event) -> None:
        """An event that nobody reads or waits for any more. Making one costs several microseconds."""
        self._events.append(event)

    def _new_event(self) -> Event:
        return Moment()

    def trim(self) -> None:
        """Give memory that the allocator caches back to the driver."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on the copy stream. The thread has asked for its ``compute_stream`` before."""
        self.copy_on(self.stream, target, source)

    def copy_on(self, stream: object, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on a stream of this link, as ``copy`` does."""
        target.copy_(source, non_blocking=True)

    def second_stream(self) -> object:
        """A stream for what follows the copies."""
        return None

    def stream_waits_for(self, stream: object, event: Event) -> None:
        """What is queued from now on on ``stream`` begins after ``event``."""

    def synchronize_stream(self, stream: object) -> None:
        """Wait for all that is queued on ``stream``."""

    def copy_waits_for(self, event: Event) -> None:
        """Copies queued from now on begin after ``event``."""

    def compute_waits_for(self, event: Event, stream: object) -> None:
        """Compute queued from now on on the compute stream ``stream`` begins after ``event``."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8, allocated on the compute stream; copies into it begin after what is queued there now."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def memory_peak(self) -> int:
        """Highest number of bytes that torch's allocator had in use since ``reset_memory_peak``; 0 on a CPU."""
        return 0

    def reset_memory_peak(self) -> None:
        """Begin a new measurement for ``memory_peak``."""

    def synchronize(self) -> None:
        """Wait for all copies."""


class CudaLink(Link):
    """One copy stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self._index = device.index
        self._streams = threading.local()
        self._others: dict[torch.device, torch.cuda.Stream] = {}

    def compute_stream(self) -> torch.cuda.Stream:
        stream = self._streams.current = torch.cuda.current_stream(self._index)
        return stream

    def computing_on(self, stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream)

    def _new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def copy_on(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.is_cuda and source.device != self.device:
            self._copy_between(stream, target, source)
            return
        if torch.cuda.current_device() != self._index:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            return
        # as the context manager does, at a third of its cost
        before = self._streams.current if hasattr(self._streams, "current") else self.compute_stream()
        torch.cuda.set_stream(stream)
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(before)

    def _copy_between(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        """From another card: torch runs such a copy on the source card's current stream, between two barriers with the current
        stream of the target card (aten/src/ATen/native/cuda/Copy.cu). Both are streams of our own, so that it waits for
        nobody's compute, and events on ``stream`` order it as they order copies from RAM."""
        other = self._others.get(source.device)
        if other is None:
            other = self._others[source.device] = torch.cuda.Stream(source.device)
        with torch.cuda.stream(other), torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def second_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def stream_waits_for(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def synchronize_stream(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def copy_waits_for(self, event: torch.cuda.Event) -> None:
        self.stream.wait_event(event)

    def compute_waits_for(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        stream.wait_event(event)

    def empty(self, nbytes: int) -> torch.Tensor:
        buffer = super().empty(nbytes)
        self.stream.wait_stream(self.compute_stream())
        return buffer

    def memory_peak(self) -> int:
        return torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["peak"]

    def reset_memory_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        self.stream.synchronize()


def open_link(device: torch.device) -> Link:
    """The link to ``device``."""
    return CudaLink(device) if device.type == "cuda" else Link(device)
