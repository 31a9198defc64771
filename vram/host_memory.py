"""New host memory: of exact size, quick to fill, and page-locked by the driver where a GPU reads it.

Most of what filling new memory costs is the system's work at the first touch of each page. Linux gives a private mapping huge
pages of 2 MiB, at least where it is asked for them; a shared one it does not, because for those the setting is another, and
is "never" unless an administrator changed it (Linux, Documentation/admin-guide/mm/transhuge.rst). See benchmarks/README.md.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref

import torch

from .page_lock import Registrar
from .units import MIB, format_bytes

log = logging.getLogger(__name__)

HUGE_PAGE = 2 * MIB  # x86-64, and ARM with pages of 4 KiB
_inherited: list[mmap.mmap] = []  # in a forked process: page-locked memory of its parent


class NoHostMemory(MemoryError):
    """The system gave no memory for a segment."""


def _advise(mapping: mmap.mmap, advice: str, begin: int, nbytes: int) -> None:
    """Tell the system how memory is used, where it can be told."""
    if hasattr(mmap, advice) and nbytes:
        try:
            mapping.madvise(getattr(mmap, advice), begin, nbytes)
        except OSError as error:  # a kernel without huge pages
            log.debug("the system does not take %s: %s", advice, error)


def _in_huge_pages(nbytes: int) -> int:
    """How many of so many bytes fill huge pages, where these can be asked for."""
    return nbytes // HUGE_PAGE * HUGE_PAGE if hasattr(mmap, "MADV_HUGEPAGE") else 0


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """A mapping that holds ``nbytes`` from the offset that is returned, which is that of a huge page where it fills some: these are
    asked for. Raises NoHostMemory."""
    huge = _in_huge_pages(nbytes)
    size = nbytes + HUGE_PAGE if huge else max(nbytes, mmap.PAGESIZE)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        mapping = mmap.mmap(-1, size, **private)
    except (OSError, MemoryError) as error:
        raise NoHostMemory(
            f"the system has no {format_bytes(nbytes)} of RAM left for weights ({error}); close other programs, "
            "or let the page file be larger"
        ) from error
    begin = -_view(mapping, 0, 1).data_ptr() % HUGE_PAGE if huge else 0
    _advise(mapping, "MADV_HUGEPAGE", begin, huge)
    return mapping, begin


def _view(mapping: mmap.mmap, begin: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], which keeps the mapping alive; its storage is as large."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=begin)


def new_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes]: as ``torch.empty``, but in huge pages where they can be asked for, and so filled faster. Raises
    NoHostMemory, or torch's RuntimeError."""
    return _view(*_map(nbytes), nbytes) if _in_huge_pages(nbytes) else torch.empty(nbytes, dtype=torch.uint8)


class HostSegment:
    """``nbytes`` of host memory as ``buffer`` (uint8, one dimension, page-aligned), which can be page-locked.

    The memory lives as long as the segment or any tensor that views ``buffer``. A process that is forked while it is page-locked
    does not get it, as it does not get what the driver allocates, because Linux would copy all of it at once: the child may not
    read it, and is ended (SIGSEGV) if it does. Raises NoHostMemory.
    """

    def __init__(self, nbytes: int) -> None:
        self._mapping, self._begin = mapping, begin = _map(nbytes)
        with torch.inference_mode(False):
            self.buffer = _view(mapping, begin, nbytes)
        with torch.inference_mode():
            self._inference_buffer = _view(mapping, begin, nbytes)
        self.nbytes = nbytes
        self.refusal: str | None = None
        self._finalizer: weakref.finalize | None = None

    def buffer_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory as a tensor that ``tensor.data`` can become a view of: an inference tensor for an inference tensor."""
        return self._inference_buffer if tensor.is_inference() else self.buffer

    @property
    def page_locked(self) -> bool:
        """Whether the memory is registered with the driver, so that copies from it run asynchronously."""
        return self._finalizer is not None and self._finalizer.alive

    def page_lock(self, registrar: Registrar | None) -> bool:
        """Register the memory. False where there is nothing to register it with, or where the driver refuses:
        ``refusal`` then says why."""
        if registrar is None or self.page_locked or not self.nbytes:
            return self.page_locked
        address = self.buffer.data_ptr()
        self.refusal = registrar.register(address, self.nbytes)
        if self.refusal is None:
            place = (self._mapping, self._begin, self.nbytes)
            self._finalizer = weakref.finalize(self, _unregister, registrar, address, os.getpid(), *place)
            _advise(self._mapping, "MADV_DONTFORK", self._begin, self.nbytes)
        else:
            log.debug("the driver refused to page-lock %s: %s", format_bytes(self.nbytes), self.refusal)
        return self.page_locked

    def release(self) -> str | None:
        """Undo ``page_lock``. No copy from the segment may be under way. Returns None, or why the driver refused: the device
        is lost."""
        return self._finalizer() if self._finalizer is not None else None


def _unregister(
    registrar: Registrar, address: int, owner: int, mapping: mmap.mmap, begin: int, nbytes: int
) -> str | None:
    """Undo ``HostSegment.page_lock`` in the process that did it."""
    if os.getpid() != owner:
        _inherited.append(mapping)  # unmapped, it would take along what lies there in this process
        return None
    reason = registrar.unregister(address)
    if reason is None:
        _advise(mapping, "MADV_DOFORK", begin, nbytes)
    else:
        log.debug("page-locked memory at %#x could not be unregistered (%s)", address, reason)
    return reason
