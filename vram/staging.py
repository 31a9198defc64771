"""Streaming from memory that is not page-locked: a worker thread passes it through a small page-locked ring."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .arena import HostSegment
from .link import Link
from .units import MIB

BUFFERS = 4
BUFFER_BYTES = 16 * MIB


@dataclass(frozen=True)
class Piece:
    """A run of host memory (``source``: uint8 or any contiguous tensor) that goes to byte ``offset`` of a unit."""

    source: torch.Tensor
    offset: int
    nbytes: int


class StagingRing:
    """A named daemon thread that copies pieces through page-locked buffers. Started on first use, ended by ``close``."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._buffers: list[tuple[HostSegment, torch.cuda.Event]] = []
        self._next = 0

    def submit(self, pieces: list[Piece], target: torch.Tensor, before: Callable[[], None], after: Callable) -> None:
        """Queue the copy of ``pieces`` into ``target``. On the worker thread ``before()`` runs first and
        ``after(error)`` last, when all copies are queued on the copy stream (error None) or one failed."""

        def job() -> None:
            try:
                before()
                for piece in pieces:
                    self._copy(piece, target)
            except Exception as error:
                after(error)
            else:
                after(None)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="intelligent-vram-staging", daemon=True)
            self._thread.start()
        self._queue.put(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def _buffer(self) -> tuple[HostSegment, torch.cuda.Event]:
        if len(self._buffers) < BUFFERS:
            segment = HostSegment(BUFFER_BYTES)
            segment.page_lock(self.link.device)
            self._buffers.append((segment, self.link.event()))
            return self._buffers[-1]
        self._next = (self._next + 1) % BUFFERS
        segment, event = self._buffers[self._next]
        event.synchronize()
        return segment, event

    def _copy(self, piece: Piece, target: torch.Tensor) -> None:
        address = piece.source.data_ptr()
        for start in range(0, piece.nbytes, BUFFER_BYTES):
            size = min(BUFFER_BYTES, piece.nbytes - start)
            segment, event = self._buffer()
            ctypes.memmove(segment.buffer.data_ptr(), address + start, size)
            begin = piece.offset + start
            self.link.copy(target[begin : begin + size], segment.buffer[:size])
            event.record(self.link.stream)

    def close(self) -> None:
        """End the thread after what is queued, and release the buffers."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.link.synchronize()
        for segment, _ in self._buffers:
            segment.release()
        self._buffers.clear()
