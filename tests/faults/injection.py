"""Faults on purpose: the n-th call of a kind fails, or all from the n-th on.

Kinds: ``allocate`` (device memory of the engine), ``copy`` (to the device), ``event`` (recording and waiting on streams),
``synchronize``, ``compute`` (an allocation of the model's own, in a block), ``interrupt`` (a cancelled prompt, in a block),
``page_lock``, ``fill`` (copying weights into packed memory), ``patch`` (a LoRA), ``progress`` (the host's progress bar), ``free``
(asking the driver how much is free).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from intelligent_vram.vram import Patches, arena, limit, packing, staging, swap
from intelligent_vram.vram.link import Event, Link, open_link
from intelligent_vram.vram.page_lock import Registrar, registrar_for
from torch import nn


class DeviceLost(RuntimeError):
    """What torch raises when the device does not answer any more."""


class Refused(Exception):
    """The driver page-locks no more."""


class Interrupted(BaseException):
    """A prompt was cancelled. ComfyUI's is an Exception; KeyboardInterrupt is not."""


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no room (injected)")


ERRORS = {
    "allocate": (out_of_memory,),
    "copy": (lambda: DeviceLost("CUDA error: unspecified launch failure (injected)"), out_of_memory),
    "event": (lambda: DeviceLost("CUDA error: unspecified launch failure (injected)"),),
    "synchronize": (lambda: DeviceLost("CUDA error: device lost (injected)"),),
    "compute": (out_of_memory, lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED (injected)")),
    "interrupt": (lambda: Interrupted("injected"), lambda: ValueError("injected")),
    "page_lock": (lambda: Refused("CUDA error 2, out of memory (injected)"),),
    "fill": (lambda: MemoryError("injected"), lambda: OSError("the file is gone (injected)")),
    "patch": (lambda: RuntimeError("the LoRA does not fit (injected)"), out_of_memory),
    "progress": (lambda: Interrupted("injected"),),
    "free": (lambda: DeviceLost("CUDA error: unknown error (injected)"),),
}
INJECTED = (torch.OutOfMemoryError, DeviceLost, Interrupted, ValueError, MemoryError, OSError, RuntimeError)


@dataclass
class Faults:
    """Which calls fail: for each kind the numbers of the calls, counted from 0, and of which of ERRORS. ``forever``: from
    that call on all of the kind, as with a device that is lost."""

    at: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    forever: frozenset[str] = frozenset()
    armed: bool = True

    def __post_init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self._lock = threading.Lock()

    def hit(self, kind: str) -> None:
        """A call of ``kind``. Raises if it is one that fails."""
        with self._lock:
            if not self.armed:
                return
            number = self.calls[kind]
            self.calls[kind] += 1
            which = self.at.get(kind, {})
            failing = which.get(number)
            if failing is None and kind in self.forever and which and number > min(which):
                failing = which[min(which)]
            if failing is None:
                return
            self.hits[kind] += 1
        raise ERRORS[kind][failing % len(ERRORS[kind])]()

    def reached(self, kind: str) -> bool:
        return self.hits[kind] > 0


class FaultyEvent:
    """An event of the link's own kind, whose recording can fail."""

    def __init__(self, event: Event, faults: Faults) -> None:
        self.event, self._faults = event, faults

    def record(self, stream: object = None) -> None:
        self._faults.hit("event")
        self.event.record(stream)

    def elapsed_time(self, other: FaultyEvent) -> float:
        return self.event.elapsed_time(other.event)

    def __getattr__(self, name: str) -> object:
        return getattr(self.event, name)


def faulty_link(faults: Faults, device: torch.device) -> Link:
    """The link to ``device``, whose calls can fail."""
    base = type(open_link(device))

    class FaultyLink(base):
        def _new_event(self) -> FaultyEvent:
            return FaultyEvent(super()._new_event(), faults)

        def empty(self, nbytes: int) -> torch.Tensor:
            faults.hit("allocate")
            return super().empty(nbytes)

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            faults.hit("copy")
            super().copy(target, source)

        def copy_waits_for(self, event: FaultyEvent) -> None:
            faults.hit("event")
            super().copy_waits_for(event.event)

        def compute_waits_for(self, event: FaultyEvent, stream: object) -> None:
            faults.hit("event")
            super().compute_waits_for(event.event, stream)

        def synchronize(self) -> None:
            faults.hit("synchronize")
            super().synchronize()

    return FaultyLink(device)


class FaultyRegistrar:
    """Page-locks for a device, on a CPU in name only; the driver can refuse. ``locked`` holds what is page-locked now."""

    def __init__(self, faults: Faults, device: torch.device) -> None:
        self._faults, self._real, self.locked = faults, registrar_for(device), {}

    def register(self, address: int, nbytes: int) -> str | None:
        try:
            self._faults.hit("page_lock")
        except Refused as refusal:
            return str(refusal)
        reason = self._real.register(address, nbytes) if self._real is not None else None
        if reason is None:
            self.locked[address] = nbytes
        return reason

    def unregister(self, address: int) -> str | None:
        del self.locked[address]
        return self._real.unregister(address) if self._real is not None else None


def disturb(model: nn.Module, faults: Faults) -> None:
    """Let allocations fail, and prompts be cancelled, in the middle of the model's blocks."""
    for block in model.blocks:
        layer = next(module for module in block.modules() if isinstance(module, nn.GELU))
        layer.register_forward_hook(lambda *_: faults.hit("compute"))
        layer.register_forward_hook(lambda *_: faults.hit("interrupt"))


def patches(faults: Faults, strength: float, which: str) -> Patches:
    """A LoRA of ``strength`` on the weights whose path holds ``which``, whose computation can fail."""

    def apply(path: str, tensor: torch.Tensor) -> torch.Tensor:
        faults.hit("patch")
        return tensor + strength

    return Patches(lambda path: strength if strength and which in path else None, apply)


def progress(faults: Faults):
    """A progress bar through which the host may break off."""

    def told(done: int, total: int) -> None:
        faults.hit("progress")

    return told


@contextmanager
def injected(faults: Faults, monkeypatch) -> Iterator[Faults]:
    """While inside, what the engine calls can fail."""
    copy_host, budget_now = packing.copy_host, limit.budget_now
    registrars: dict[torch.device, FaultyRegistrar] = {}

    def faulty_copy(*args: object) -> None:
        faults.hit("fill")
        copy_host(*args)

    def faulty_registrar(device: torch.device) -> Registrar:
        return registrars.setdefault(device, FaultyRegistrar(faults, device))

    def faulty_budget(*args: object) -> int:
        faults.hit("free")
        return budget_now(*args)

    with monkeypatch.context() as patch:
        patch.setattr(swap, "open_link", lambda device: faulty_link(faults, device))
        patch.setattr(packing, "copy_host", faulty_copy)
        patch.setattr(limit, "budget_now", faulty_budget)
        for module in (arena, staging):
            patch.setattr(module, "registrar_for", faulty_registrar)
        yield faults
    assert not any(registrar.locked for registrar in registrars.values()), "all is unlocked again"
