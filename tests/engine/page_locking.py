"""A registrar for tests on a CPU: it holds every range to be page-locked once, and can refuse."""

import threading

import torch
from intelligent_vram.vram import PackedModel, SwapConfig, attach
from intelligent_vram.vram.host_budget import HostBudget
from intelligent_vram.vram.rest import sort_tensors
from intelligent_vram.vram.units import GIB

CPU = torch.device("cpu")


class Registrar:
    """What the driver does with page-locked memory, without a driver: ranges must not overlap, and only what was registered
    can be unregistered. ``refuse``: numbers of the calls to ``register`` that are refused; ``most``: bytes after which all are."""

    def __init__(self, refuse=(), most=None):
        self.ranges = {}
        self.calls = 0
        self.refuse, self.most, self.lost = refuse, most, False
        self._lock = threading.Lock()

    @property
    def nbytes(self):
        return sum(self.ranges.values())

    def register(self, address, nbytes):
        with self._lock:
            self.calls += 1
            if self.lost or self.calls in self.refuse or (self.most is not None and self.nbytes + nbytes > self.most):
                return "error 2, out of memory"
            overlapping = [a for a, size in self.ranges.items() if a < address + nbytes and address < a + size]
            assert overlapping == [], "memory is page-locked already"
            self.ranges[address] = nbytes
            return None

    def unregister(self, address):
        with self._lock:
            size = self.ranges.pop(address, None)
            return "error 1, the device is lost" if self.lost or size is None else None


class Ram:
    """RAM of a machine that only has numbers."""

    def __init__(self, total=64 * GIB, available=60 * GIB):
        self.total, self.available = total, available

    def __call__(self):
        return self.total, self.available


def shared_budget(limit, ram=None):
    return HostBudget(limit, ram or Ram())


def attach_locked(model, registrar, shared, config=None, packed=None, **more):
    """Block swap on a CPU whose packed weights are page-locked by ``registrar`` within ``shared``."""
    config = config or SwapConfig(mode="chunkwise", block_size=9000)
    if packed is None:
        layers = sort_tensors(model, config)[0]
        packed = PackedModel(CPU, layers, config.block_size, config.host_budget, registrar=registrar, shared=shared)
    return attach(model, config, "cpu", packed=packed, **more)
