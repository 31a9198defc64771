"""Host memory that the packed weights live in: exact size, page-locked where possible, filled by several threads.

``torch``'s pinned allocator rounds sizes up to a power of two (pytorch issues 95823 and 150517). Here memory is a mapping of
exactly the packed size (host_memory.py), registered with the CUDA runtime after it was filled: several mappings filled and
registered by as many threads is the fastest way (see benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from .host_budget import Holder, HostBudget, process_budget
from .host_memory import HostSegment, NoHostMemory
from .layout import TensorSpec
from .page_lock import Registrar, registrar_for
from .units import format_bytes

log = logging.getLogger(__name__)

FILL_THREADS = 16
AHEAD = 2  # times as many segments as threads are filled, or about to be, before those that are ready are taken
Meanwhile = Callable[[Callable[[], None]], None]  # see Arena.fill
AT_ONCE = 8  # one part in so many of the free RAM is filled at the same time: what is replaced is released afterwards


def lies_as(spec: TensorSpec, source: torch.Tensor) -> bool:
    """Whether the bytes of ``source``, in host memory, are those that ``spec`` describes."""
    lazy = source.is_conj() or source.is_neg()
    return source.device.type == "cpu" and tuple(source.stride()) == spec.stride and not lazy


def copy_host(spec: TensorSpec, source: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy a plain tensor into its place in ``buffer`` without holding the GIL: by ``memmove`` where both lie in host
    memory and the tensor as ``spec`` says, else by ``Tensor.copy_``."""
    if buffer.device.type == "cpu" and lies_as(spec, source):
        ctypes.memmove(buffer.data_ptr() + spec.offset, source.data_ptr(), spec.nbytes)
    else:
        spec.view(buffer).copy_(source)


@dataclass(frozen=True)
class FillJob:
    """A segment to make: its size in bytes, and ``fill(buffer)``.
    ``page_lock``: it was claimed (``Arena.claim``) and is to be page-locked.
    ``on_calling_thread``: not on a thread of the arena, for weights that come from a device or are patched there;
    memory is then page-locked before it is filled, because the device writes to it.
    ``optional``: what it would hold can stay where it is, if the system has no memory for it."""

    nbytes: int
    fill: Callable[[torch.Tensor], None]
    page_lock: bool
    on_calling_thread: bool = False
    optional: bool = False


class Arena:
    """Segments of host memory for one attached model, filled by a few threads, and page-locked as far as the process'
    budget goes. ``budget``: bytes that the user grants to this model, instead of what is free in RAM.

    ``registrar`` page-locks (None: nothing has to be, as on a CPU), ``shared`` is the budget of the process.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None = None,
        threads: int | None = None,
        *,
        registrar: Registrar | None = None,
        shared: HostBudget | None = None,
    ) -> None:
        self.device = device
        self.budget = budget
        self.threads = threads or max(1, min(FILL_THREADS, os.cpu_count() or 1))
        self.registrar = registrar or registrar_for(device)
        self.shared = shared or process_budget()
        self._holder: Callable[[], Holder | None] = lambda: None
        self.page_locked_bytes = 0
        self._refused = self._stuck = 0
        self._reason = ""

    @property
    def holder(self) -> Holder | None:
        """Who does not give back for its own sake."""
        return self._holder()

    @holder.setter
    def holder(self, holder: Holder) -> None:
        self._holder = weakref.ref(holder)

    def claim(self, nbytes: int, taken: int, *, new: bool = True, older_than: int | None = None) -> bool:
        """Whether ``nbytes`` more may be packed (``new``) and page-locked, where this model has ``taken``. They are then
        counted, and belong into a FillJob with ``page_lock``, or are page-locked by ``lock``."""
        if self.budget is not None and taken + nbytes > self.budget:
            return False
        if self._refused and not new:
            return False
        return self.shared.claim(
            nbytes,
            self.holder,
            new=new,
            lock=self.registrar is not None,
            insist=self.budget is not None,
            older_than=older_than,
        )

    def fill(
        self,
        jobs: Sequence[FillJob],
        when_done: Callable[[int, HostSegment | None], None],
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Make, fill and page-lock a segment per job, as many at a time as there are threads: separate mappings are filled in
        parallel faster than parts of one. ``when_done(index, segment)`` is called on the calling thread as soon as a segment is
        ready, so that the memory that it replaces can be released; threads are somewhat ahead of it, if free RAM allows.
        ``segment`` is None for an optional one that there was no memory for. ``meanwhile(go_on)`` is called once, on the calling
        thread, when the others have begun; now and then it calls ``go_on()``, which takes what is ready, so that threads need not
        wait. Raises the first error of any copy; what was not handed over by then is released.
        """
        begun: set[int] = set()
        made: dict[int, HostSegment | None] = {}

        def make(index: int) -> None:
            begun.add(index)
            made[index] = self._make(jobs[index])

        def hand_over(index: int) -> None:
            when_done(index, made.pop(index))

        try:
            room = self.shared.ram()[1] // AT_ONCE
            with ThreadPoolExecutor(self.threads, thread_name_prefix="intelligent-vram-fill") as pool:
                try:
                    self._fill(jobs, room, pool, make, hand_over, meanwhile)
                finally:
                    pool.shutdown(cancel_futures=True)
        except BaseException:
            for index, job in enumerate(jobs):
                if index not in begun:
                    self._unclaim(job)
                elif (segment := made.pop(index, None)) is not None:
                    self.drop(segment)
            raise
        finally:
            self.tell_refusals()

    def _fill(
        self,
        jobs: Sequence[FillJob],
        room: int,
        pool: ThreadPoolExecutor,
        make: Callable[[int], None],
        hand_over: Callable[[int], None],
        meanwhile: Meanwhile | None,
    ) -> None:
        """``make`` each job and ``hand_over`` it, with up to ``room`` bytes under way."""
        waiting = deque(range(len(jobs)))
        running: dict[Future[None], int] = {}

        def begin(own: bool) -> None:
            while waiting and len(running) < AHEAD * self.threads:
                index = waiting[0]
                if running and jobs[index].nbytes + sum(jobs[number].nbytes for number in running.values()) > room:
                    return
                if not jobs[index].on_calling_thread:
                    running[pool.submit(make, index)] = index
                elif own:
                    make(index)
                    hand_over(index)
                else:
                    return
                waiting.popleft()

        def take(timeout: float | None) -> None:
            for future in wait(running, timeout, FIRST_COMPLETED).done:
                index = running.pop(future)
                future.result()
                hand_over(index)

        def go_on() -> None:
            take(0)
            begin(own=False)

        begin(own=True)
        if meanwhile is not None:
            meanwhile(go_on)
        while waiting or running:
            take(None)
            begin(own=True)

    def _make(self, job: FillJob) -> HostSegment | None:
        segment: HostSegment | None = None
        try:
            segment = HostSegment(job.nbytes)
            if job.on_calling_thread and job.page_lock:
                self._register(segment)
            job.fill(segment.buffer)
            if job.page_lock and not segment.page_locked and segment.refusal is None:
                self._register(segment)
        except BaseException as error:
            if segment is not None:
                segment.release()
            self._unclaim(job)
            if job.optional and isinstance(error, NoHostMemory):
                return None
            raise
        if job.page_lock:
            self.shared.filled(segment, job.nbytes)
            self._count(segment)
        return segment

    def _unclaim(self, job: FillJob) -> None:
        if job.page_lock:
            self.unclaim(job.nbytes)

    def _register(self, segment: HostSegment) -> None:
        """Page-lock a segment that was claimed. Where the driver refuses, once more after others gave back as much."""
        if self._refused or segment.page_lock(self.registrar) or self.registrar is None or not segment.nbytes:
            return
        if self.shared.take(segment.nbytes, self.holder) and segment.page_lock(self.registrar):
            return
        with self.shared.lock:
            self._reason = self._reason or segment.refusal or ""

    def _count(self, segment: HostSegment) -> None:
        """Count a segment that was claimed and is page-locked, or take the claim back."""
        if self.registrar is None:
            return
        with self.shared.lock:
            if segment.page_locked:
                self.page_locked_bytes += segment.nbytes
            else:
                self._refused += segment.nbytes
                self.shared.unlocked(segment.nbytes)

    def unclaim(self, nbytes: int) -> None:
        """What was claimed is not wanted after all."""
        self.shared.unclaim(nbytes, new=True, lock=self.registrar is not None)

    def lock(self, segment: HostSegment, older_than: int | None = None) -> bool:
        """Page-lock a filled segment that is not, if the budget affords it and the driver does not refuse; other models
        give back for it as ``HostBudget.claim`` says. True if it is page-locked."""
        if segment.page_locked or self.registrar is None or not segment.nbytes:
            return True
        if not self.claim(segment.nbytes, self.page_locked_bytes, new=False, older_than=older_than):
            return False
        self._register(segment)
        self._count(segment)
        return segment.page_locked

    def tell_refusals(self) -> None:
        """Say in a line what the driver refused since the last time, and try it again from now on."""
        if self._refused:
            log.warning(
                "the driver refused to page-lock %s of RAM (%s); these weights stream through a small page-locked "
                "staging ring instead, which is slower",
                format_bytes(self._refused),
                self._reason,
            )
        if self._stuck:
            log.warning(
                "the driver did not take back %s of page-locked RAM (%s)", format_bytes(self._stuck), self._reason
            )
        self._refused, self._stuck, self._reason = 0, 0, ""

    def drop(self, segment: HostSegment) -> None:
        """Give a segment's page-locked memory back to the system's pageable memory."""
        if segment.page_locked:
            reason = segment.release()
            with self.shared.lock:
                if reason is not None:
                    self._stuck += segment.nbytes
                    self._reason = reason
                self.page_locked_bytes -= segment.nbytes
                self.shared.unlocked(segment.nbytes)
