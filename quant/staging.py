"""Files into tensors and tensors out of a device, through a little host memory that is used again and again.

Threads read ahead in pieces, into memory that is page-locked where the device is a GPU, so that reading, copying, quantizing and
writing overlap and neither the page cache nor a whole file counts as this process's memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from ..vram.host_memory import HostSegment
from ..vram.model_headers import ModelUnreadable
from ..vram.page_lock import registrar_for
from ..vram.units import MIB
from .source import Located

PIECE = 16 * MIB  # that is read at once
AHEAD = 16  # pieces
READERS = 4  # threads: one alone fills memory slower than fast disks read
WRITERS = 4
WAITING = 3  # tensors on their way out


def _threads(most: int) -> int:
    return max(1, min(most, os.cpu_count() or 1))


class ReadAhead:
    """The bytes of ``tensors``, in this order, read ahead by threads. A context manager."""

    def __init__(self, tensors: Sequence[Located], device: torch.device) -> None:
        self.device = device
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        pieces = sum(-(-tensor.nbytes // PIECE) for tensor in tensors)
        self._piece = min(PIECE, largest)
        self._segments = [HostSegment(self._piece) for _ in range(min(AHEAD, pieces))]
        self._pieces = iter(_pieces(tensors))
        self._events: dict[int, torch.cuda.Event] = {}
        self._running: deque[tuple[Future[None], int, int]] = deque()
        self._pool = ThreadPoolExecutor(_threads(READERS), thread_name_prefix="intelligent-vram-read")

    def __enter__(self) -> ReadAhead:
        for slot, segment in enumerate(self._segments):
            segment.page_lock(registrar_for(self.device))
            self._read_into(slot)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for event in self._events.values():
            event.synchronize()
        for segment in self._segments:
            segment.release()

    def next_into(self, destination: torch.Tensor) -> None:
        """Copy the bytes of the next tensor into ``destination``, uint8 [nbytes], on the device or in host memory; on a GPU
        the copy may still be under way. Raises ModelUnreadable when the file ends too early or cannot be read."""
        begin = 0
        while begin < len(destination):
            future, slot, size = self._running.popleft()
            future.result()
            destination[begin : begin + size].copy_(self._segments[slot].buffer[:size], non_blocking=True)
            if destination.is_cuda:
                self._events[slot] = torch.cuda.Event()
                self._events[slot].record(torch.cuda.current_stream(destination.device))
            begin += size
            self._read_into(slot)

    def _read_into(self, slot: int) -> None:
        """Begin to read the next piece into a slot, once what it holds is on the device."""
        piece = next(self._pieces, None)
        if piece is not None:
            file, start, size = piece
            buffer = self._segments[slot].buffer[:size]
            self._running.append((self._pool.submit(_read, file, start, buffer, self._events.get(slot)), slot, size))


def _pieces(tensors: Sequence[Located]) -> Iterator[tuple[Path, int, int]]:
    for tensor in tensors:
        for begin in range(0, tensor.nbytes, PIECE):
            yield tensor.file, tensor.start + begin, min(PIECE, tensor.nbytes - begin)


def _read(path: Path, start: int, buffer: torch.Tensor, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
    left = memoryview(buffer.numpy())
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left:
                count = file.readinto(left)
                if not count:
                    raise ModelUnreadable(f"{path}: it ends at byte {file.tell()}, in the middle of its weights")
                left = left[count:]
    except OSError as error:
        raise ModelUnreadable(f"{path}: it could not be read: {error.strerror or error}") from None


class Outbox:
    """Hands tensors to ``put`` on a few threads, those of a GPU by way of page-locked memory. A context manager: at its end
    all are through, or the first error is raised.

    ``put(name, tensor, staged)`` gets a CPU tensor; with ``staged`` it is only valid during the call and has to be copied.
    ``largest``: bytes of the largest tensor of a GPU that will be sent.
    """

    def __init__(self, put: Callable[[str, torch.Tensor, bool], None], device: torch.device, largest: int) -> None:
        self._put = put
        self._room = threading.BoundedSemaphore(WAITING)
        self._free: queue.SimpleQueue[HostSegment] = queue.SimpleQueue()
        self._segments = [HostSegment(largest) for _ in range(WAITING)] if device.type == "cuda" else []
        self._running: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(_threads(WRITERS), thread_name_prefix="intelligent-vram-write")
        for segment in self._segments:
            segment.page_lock(registrar_for(device))
            self._free.put(segment)

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        for segment in self._segments:
            segment.release()
        if error is None:
            self._raise_errors(all_of_them=True)

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """Hand on a tensor; waits while WAITING of them are on their way. Raises the error of an earlier one."""
        self._room.acquire()
        self._raise_errors()
        segment = None
        if tensor.is_cuda:
            segment = self._free.get()
            staged = segment.buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor = staged.copy_(tensor)
        self._running.append(self._pool.submit(self._finish, name, tensor, segment))

    def _finish(self, name: str, tensor: torch.Tensor, segment: HostSegment | None) -> None:
        try:
            self._put(name, tensor, segment is not None)
        finally:
            if segment is not None:
                self._free.put(segment)
            self._room.release()

    def _raise_errors(self, all_of_them: bool = False) -> None:
        while self._running and (all_of_them or self._running[0].done()):
            self._running.popleft().result()
