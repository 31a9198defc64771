"""What a forward was called with, kept so that it can be called again after an allocation failed in the middle of it.

A forward may change what it is given before it fails: lists that it takes from, dictionaries that it writes to, counters on
the model, the state of random numbers. ``Call.restore`` puts these back. Large tensors are not copied: the bits of their
contents are summed, and a forward that wrote to one of its arguments is not repeated.
"""

from __future__ import annotations

import traceback
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LARGEST = 20_000  # values looked at; what lies beyond is taken as unchanged
LARGEST_PRINT = 256 << 20  # bytes of one argument that are read at every forward
SMALL = 1 << 20  # bytes of an argument that is simply copied
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
WORDS = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "can't allocate memory")
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OF_MODULES = frozenset(nn.Module().__dict__)  # what torch keeps on every module
ATOMS = (
    *(str, bytes, bytearray, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Generator),
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that the device, or a library that computes on it, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())) and getattr(error, "error_code", 0) != 0:
        return error.error_code == CUDA_OUT_OF_MEMORY
    text = str(error).lower()
    return any(words in text for words in WORDS)


def let_go(error: BaseException) -> None:
    """Drop the frames that an exception went through, with all that their variables keep alive.

    A frame that raises an exception which a variable of its own holds keeps it, and it the frame, and both all that the forward
    had computed, until the garbage collector comes. Such variables of the engine's are emptied when they are raised.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
        waiting += (one.__cause__, one.__context__)


class Call:
    """The arguments of a forward of ``module``, as they are before it. Takes some 100 microseconds."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], device: torch.device) -> None:
        self._device = device
        self._kept: list[tuple[Any, Any]] = []
        self._prints: list[tuple[torch.Tensor, list[torch.Tensor] | None]] = []
        seen: set[int] = {id(module)}
        for tensor in self._keep([*args, *kwargs.values()], seen):
            self._prints.append((tensor, _print(tensor)))
        # tensors that the model keeps are replaced, not written to; those of its parts are its weights
        own = {name: value for name, value in module.__dict__.items() if name not in OF_MODULES}
        self._attributes = module.__dict__, own
        for _ in self._keep(list(own.values()), seen):
            pass
        self._random = torch.get_rng_state()
        self._device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _keep(self, values: list[Any], seen: set[int]) -> Iterator[torch.Tensor]:
        """Copy the containers that ``values`` reach, one level of objects included; tensors that these hold."""
        waiting = [(value, True) for value in values]
        while waiting and len(seen) < LARGEST:
            value, objects = waiting.pop()
            if isinstance(value, ATOMS) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, dict):
                self._kept.append((value, dict(value)))
                waiting += ((inner, objects) for inner in value.values())
            elif isinstance(value, list | deque | set):
                self._kept.append((value, list(value)))
                waiting += ((inner, objects) for inner in value)
            elif isinstance(value, tuple | frozenset):
                waiting += ((inner, objects) for inner in value)
            elif objects and not isinstance(value, nn.Module):
                state = getattr(value, "__dict__", None)
                if isinstance(state, dict):
                    self._kept.append((state, dict(state)))
                    waiting += ((inner, False) for inner in state.values())

    def restore(self) -> str | None:
        """Put back what the forward changed. Returns what it is that cannot be put back, in words; None when all is as it
        was."""
        for tensor, before in self._prints:
            if before is None:
                return f"an argument of shape {tuple(tensor.shape)} and {tensor.dtype}, which may have been written to"
            if not all(map(torch.equal, before, _print(tensor))):
                return f"an argument of shape {tuple(tensor.shape)} and {tensor.dtype}, which was written to"
        for container, before in self._kept:
            if isinstance(container, dict):
                if _differ(container, before):
                    container.clear()
                    container.update(before)
            elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(before)
        attributes, own = self._attributes
        for name in [name for name in attributes if name not in own and name not in OF_MODULES]:
            del attributes[name]
        attributes.update(own)
        torch.set_rng_state(self._random)
        if self._device_random is not None:
            torch.cuda.set_rng_state(self._device_random, self._device)
        return None


def _differ(container: dict, before: dict) -> bool:
    return len(container) != len(before) or any(
        key not in container or container[key] is not value for key, value in before.items()
    )


def _print(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """What tells whether a tensor was written to: a copy of a small one; of a larger one the sums of its bits, as whole
    numbers, along its first and its last dimension. On its device, and the host does not wait. None for what is too large, or
    no plain tensor."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.nbytes > LARGEST_PRINT:
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return None
    with torch.no_grad():
        plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
        bits = plain.detach().view(INTEGER[plain.element_size()])
        if tensor.nbytes <= SMALL:
            return [bits.clone()]
        return [bits.sum(dim=dim, dtype=torch.int64) for dim in {0, bits.dim() - 1}]
