"""Page-locking of host memory: what registers it with the driver, behind an interface of two calls."""

from __future__ import annotations

import platform
import sys
from typing import Protocol

import torch


class Registrar(Protocol):
    """Page-locks host memory for a device. Both calls return None, or in words why the driver refused; neither raises."""

    def register(self, address: int, nbytes: int) -> str | None: ...
    def unregister(self, address: int) -> str | None: ...


class CudaRegistrar:
    """``cudaHostRegister`` of the CUDA runtime that torch uses. On ROCm builds torch offers HIP's under the same names
    (torch/csrc/cuda/shared/cudart.cpp)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def register(self, address: int, nbytes: int) -> str | None:
        try:
            with torch.cuda.device(self.device):
                status = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
                if int(status) == 0:
                    return None
                self._forget_error()
        except (RuntimeError, AttributeError) as error:  # a lost device; a build without this call
            return str(error)
        return _words(status)

    def unregister(self, address: int) -> str | None:
        try:
            status = torch.cuda.cudart().cudaHostUnregister(address)
            if int(status) == 0:
                return None
            self._forget_error()
        except (RuntimeError, AttributeError) as error:
            return str(error)
        return _words(status)

    def _forget_error(self) -> None:
        """The runtime keeps a refusal as this thread's last error, and torch would raise it at the next kernel that
        this thread starts, whoever starts it. A kernel of our own takes it away."""
        try:
            torch.empty(1, device=self.device).fill_(0)
        except RuntimeError:  # this is the refusal; the caller reports it by its status
            return


def _words(status: object) -> str:
    return f"CUDA error {int(status)}, {torch.cuda.cudart().cudaGetErrorString(status)}"


def registrar_for(device: torch.device) -> Registrar | None:
    """What page-locks memory that ``device`` reads; None where nothing needs to be."""
    return CudaRegistrar(device) if device.type == "cuda" else None


def most_page_locked(total: int) -> int | None:
    """Bytes that the system lets GPUs page-lock of its ``total`` bytes of RAM; None where it sets no limit.

    Linux: none. RLIMIT_MEMLOCK binds ``mlock``, not the driver, which pins pages itself with ``pin_user_pages``
    (NVIDIA/open-gpu-kernel-modules, kernel-open/nvidia/os-mlock.c, ``os_lock_user_pages``); it only says so when it
    cannot. Windows: half of the RAM (Microsoft, "Calculating graphics memory": TotalSystemMemoryAvailableForGraphics
    is half of the system's memory), of which a tenth is left to other programs' graphics. Under WSL 2 the limit is
    lower and not told ("CUDA on WSL": pinned system memory is limited): there it is found when the driver refuses.
    """
    if sys.platform == "win32":
        return total // 2 - total // 20
    return total // 2 if "microsoft" in platform.release().lower() else None
