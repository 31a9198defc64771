"""Host memory that the packed weights live in: exact size, page-locked where possible, filled by several threads.

``torch``'s pinned allocator rounds sizes up to a power of two (pytorch issues 95823 and 150517). Here memory is an
anonymous mapping of exactly the packed size, rounded up to a page, registered with the CUDA runtime after it was filled:
several mappings filled and registered by as many threads is the fastest way (see benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import psutil
import torch

from .layout import TensorSpec
from .units import GIB, format_bytes

log = logging.getLogger(__name__)

FILL_THREADS = 8


def _unregister(address: int) -> None:
    status = torch.cuda.cudart().cudaHostUnregister(address)
    if int(status) != 0:
        log.warning("page-locked memory at %#x could not be unregistered (CUDA error %d)", address, int(status))


class HostSegment:
    """``nbytes`` of host memory as ``buffer`` (uint8, one dimension, page-aligned), which can be page-locked.

    The memory lives as long as the segment or any tensor that views ``buffer``.
    """

    def __init__(self, nbytes: int) -> None:
        mapping = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        with torch.inference_mode(False):
            self.buffer = torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]
        with torch.inference_mode():
            self._inference_buffer = torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]
        self.nbytes = nbytes
        self._finalizer: weakref.finalize | None = None

    def buffer_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory as a tensor that ``tensor.data`` can become a view of: an inference tensor for an inference tensor."""
        return self._inference_buffer if tensor.is_inference() else self.buffer

    @property
    def page_locked(self) -> bool:
        """Whether the memory is registered with the CUDA runtime, so that copies from it run asynchronously."""
        return self._finalizer is not None and self._finalizer.alive

    def page_lock(self, device: torch.device) -> bool:
        """Register the memory with the CUDA runtime. False where the driver refuses; on a CPU nothing is needed."""
        if device.type != "cuda" or self.page_locked or not self.nbytes:
            return self.page_locked
        with torch.cuda.device(device):
            status = int(torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), self.nbytes, 0))
        if status != 0:
            log.warning(
                "the driver refused to page-lock %s of RAM (CUDA error %d); these weights stream through a small "
                "page-locked staging ring instead, which is slower",
                format_bytes(self.nbytes),
                status,
            )
            return False
        self._finalizer = weakref.finalize(self, _unregister, self.buffer.data_ptr())
        return True

    def release(self) -> None:
        """Undo ``page_lock``. No copy from the segment may be under way."""
        if self._finalizer is not None:
            self._finalizer()


def page_lockable(total: int, available: int) -> int:
    """Bytes of RAM that may be page-locked where ``available`` of ``total`` are free: what leaves the system 4 GiB or
    10% of its memory, whichever is more."""
    return max(0, available - max(4 * GIB, total // 10))


def default_budget() -> int:
    """``page_lockable`` of this machine now, in bytes."""
    host = psutil.virtual_memory()
    return page_lockable(host.total, host.available)


def lies_as(spec: TensorSpec, source: torch.Tensor) -> bool:
    """Whether the bytes of ``source``, in host memory, are those that ``spec`` describes."""
    lazy = source.is_conj() or source.is_neg()
    return source.device.type == "cpu" and tuple(source.stride()) == spec.stride and not lazy


def copy_host(spec: TensorSpec, source: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy a plain tensor into its place in ``buffer`` without holding the GIL: by ``memmove`` where it lies in host
    memory as ``spec`` says, else by ``Tensor.copy_``."""
    if lies_as(spec, source):
        ctypes.memmove(buffer.data_ptr() + spec.offset, source.data_ptr(), spec.nbytes)
    else:
        spec.view(buffer).copy_(source)


@dataclass(frozen=True)
class FillJob:
    """A segment to make: its size in bytes, and ``fill(buffer)``.
    ``on_calling_thread``: not on a thread of the arena, for weights that come from a device or are patched there;
    memory is then page-locked before it is filled, because the device writes to it."""

    nbytes: int
    fill: Callable[[torch.Tensor], None]
    page_lock: bool
    on_calling_thread: bool = False


class Arena:
    """Segments of host memory for one attached model, filled by a few threads, page-locked up to ``budget`` bytes."""

    def __init__(self, device: torch.device, budget: int | None = None, threads: int | None = None) -> None:
        self.device = device
        self.budget = default_budget() if budget is None else budget
        self.threads = threads or max(1, min(FILL_THREADS, os.cpu_count() or 1))
        self.page_locked_bytes = 0

    def affords(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more fit into the budget for page-locked memory."""
        return self.page_locked_bytes + nbytes <= self.budget

    def fill(self, jobs: Sequence[FillJob], when_done: Callable[[int, HostSegment], None]) -> None:
        """Make, fill and page-lock a segment per job, as many at a time as there are threads: separate mappings are
        filled in parallel faster than parts of one. ``when_done(index, segment)`` is called on the calling thread as soon
        as a segment is ready, so that the memory that it replaces can be released. Raises the first error of any copy.
        """
        waiting = list(enumerate(jobs))
        running: dict[Future[HostSegment], int] = {}
        with ThreadPoolExecutor(self.threads, thread_name_prefix="intelligent-vram-fill") as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.threads:
                        index, job = waiting.pop(0)
                        if job.on_calling_thread:
                            self._finish(index, self._make(job), when_done)
                        else:
                            running[pool.submit(self._make, job)] = index
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._finish(running.pop(future), future.result(), when_done)
            except BaseException:
                for future in running:
                    if future.exception() is None:
                        future.result().release()
                raise

    def _make(self, job: FillJob) -> HostSegment:
        segment = HostSegment(job.nbytes)
        if job.on_calling_thread and job.page_lock:
            segment.page_lock(self.device)
        job.fill(segment.buffer)
        if job.page_lock:
            segment.page_lock(self.device)
        return segment

    def _finish(self, index: int, segment: HostSegment, when_done: Callable[[int, HostSegment], None]) -> None:
        if segment.page_locked:
            self.page_locked_bytes += segment.nbytes
        when_done(index, segment)

    def lock(self, segment: HostSegment) -> None:
        """Page-lock a segment that is not, if the budget affords it and the driver does not refuse."""
        if not segment.page_locked and self.affords(segment.nbytes) and segment.page_lock(self.device):
            self.page_locked_bytes += segment.nbytes

    def drop(self, segment: HostSegment) -> None:
        """Give a segment's page-locked memory back to the system's pageable memory."""
        if segment.page_locked:
            self.page_locked_bytes -= segment.nbytes
            segment.release()
