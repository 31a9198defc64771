"""Which line of a program allocated a tensor: on CUDA devices from the allocator's own records, on a CPU by watching operators.

Both cost time while they run (a CPU operator takes about three times as long), and watching operators keeps
``torch.compile`` from its usual path: for looking for a leak, not for production.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 64 << 10  # bytes of a storage on the CPU whose line is noted
TORCH = str(Path(torch.__file__).parent)


class AlreadyRecording(RuntimeError):
    """Someone else records the allocator's history, and one record would end the other."""


def sites(device: torch.device) -> CpuSites | CudaSites:
    """What records allocations on a device, between ``start`` and ``stop``."""
    return CudaSites() if device.type == "cuda" else CpuSites()


class CpuSites(TorchDispatchMode):
    """Notes the line that called the operator that made a storage, as long as the storage lives."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[int, str] = {}

    def start(self) -> None:
        """Watch the operators that this thread runs."""
        self.__enter__()

    def stop(self) -> None:
        """Stop watching; what was noted stays."""
        self.__exit__(None, None, None)

    def lines(self, tensors: Iterable[torch.Tensor]) -> list[str | None]:
        """Where each tensor was allocated, as ``folder/file.py:43 in step``, None where that was not seen."""
        return [self._lines.get(tensor.untyped_storage()._cdata) for tensor in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() >= SMALLEST and storage._cdata not in self._lines:
                    self._lines[storage._cdata] = _caller()
                    weakref.finalize(storage, self._lines.pop, storage._cdata, None)
        return made


class CudaSites:
    """Reads the record that PyTorch's CUDA allocator keeps of its blocks."""

    def start(self) -> None:
        """Have the allocator note the Python stack of each allocation. Raises AlreadyRecording."""
        if torch._C._cuda_isHistoryEnabled():
            raise AlreadyRecording(
                "PyTorch's allocator already records its history for someone else; turn that off first"
            )
        torch.cuda.memory._record_memory_history(enabled="state", context="alloc", stacks="python")

    def stop(self) -> None:
        """End the record."""
        torch.cuda.memory._record_memory_history(enabled=None)

    def lines(self, tensors: Iterable[torch.Tensor]) -> list[str | None]:
        """As of CpuSites; read it before ``stop``."""
        blocks = [block for segment in torch.cuda.memory._snapshot()["segments"] for block in segment["blocks"]]
        stacks = {
            block["address"]: block.get("frames") or () for block in blocks if block["state"] == "active_allocated"
        }
        return [_user_frame(stacks.get(tensor.untyped_storage().data_ptr(), ())) for tensor in tensors]


def _user_frame(frames: Iterable[Mapping[str, Any]]) -> str | None:
    """The innermost frame of a program outside PyTorch; the allocator gives the innermost first."""
    for frame in frames:
        if not frame["filename"].startswith((TORCH, "<")):
            return _line(frame["filename"], frame["line"], frame["name"])
    return None


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return _line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _line(file: str, line: int, function: str) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}"
