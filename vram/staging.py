"""Streaming from memory that is not page-locked: a worker thread passes it through a small page-locked ring."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .host_memory import HostSegment
from .link import Link
from .page_lock import Registrar, registrar_for
from .units import MIB

BUFFERS = 4
BUFFER_BYTES = 16 * MIB


@dataclass(frozen=True)
class Piece:
    """A run of host memory (``source``: uint8 or any contiguous tensor) that goes to byte ``offset`` of a unit."""

    source: torch.Tensor
    offset: int
    nbytes: int


class StagingStopped(RuntimeError):
    """The staging thread ended before this copy was made. The next copy starts another thread."""


@dataclass(frozen=True)
class _Job:
    pieces: list[Piece]
    target: torch.Tensor
    before: Callable[[], None]
    after: Callable[[BaseException | None], None]


class StagingRing:
    """A named daemon thread that copies pieces through page-locked buffers. Started on first use, and again should it
    have died; ended by ``close``."""

    def __init__(self, link: Link, registrar: Registrar | None = None) -> None:
        self.link = link
        self.registrar = registrar or registrar_for(link.device)
        self._jobs: deque[_Job] = deque()
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._buffers: list[tuple[HostSegment, torch.cuda.Event]] = []
        self._next = 0

    def submit(
        self,
        pieces: list[Piece],
        target: torch.Tensor,
        before: Callable[[], None],
        after: Callable[[BaseException | None], None],
    ) -> None:
        """Queue the copy of ``pieces`` into ``target``. On the worker thread ``before()`` runs first and
        ``after(error)`` last, when all copies are queued on the copy stream (error None) or one failed. ``after`` is called
        for every job, also where the thread dies."""
        with self._state:
            self._jobs.append(_Job(pieces, target, before, after))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="intelligent-vram-staging", daemon=True)
                self._thread.start()
            self._state.notify()

    def _work(self) -> None:
        try:
            while (job := self._take()) is not None:
                self._run(job)
        finally:
            with self._state:
                self._thread = None
                left, self._jobs = self._jobs, deque()
            for job in left:
                job.after(StagingStopped("the thread that copies weights from ordinary memory ended unexpectedly"))

    def _take(self) -> _Job | None:
        """The next job; None when the ring is being closed and all are done."""
        with self._state:
            self._state.wait_for(lambda: self._jobs or self._closing)
            return self._jobs.popleft() if self._jobs else None

    def _run(self, job: _Job) -> None:
        error: BaseException | None = None
        try:
            job.before()
            for piece in job.pieces:
                self._copy(piece, job.target)
        except BaseException as failure:
            error = failure
            if not isinstance(failure, Exception):
                raise  # the thread is to end, after this job was told
        finally:
            job.after(error)

    def _buffer(self) -> tuple[HostSegment, torch.cuda.Event]:
        if len(self._buffers) < BUFFERS:
            segment = HostSegment(BUFFER_BYTES)
            segment.page_lock(self.registrar)
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
        """End the thread after what is queued, and release the buffers, also where the device is lost: then the error of
        waiting for it passes on, after all is released. The ring can be used again."""
        with self._state:
            thread, self._closing = self._thread, True
            self._state.notify_all()
        if thread is not None:
            thread.join()
        self._closing = False
        with contextlib.ExitStack() as last:
            last.callback(self._release)
            self.link.synchronize()

    def _release(self) -> None:
        buffers, self._buffers, self._next = self._buffers, [], 0
        for segment, _ in buffers:
            segment.release()
