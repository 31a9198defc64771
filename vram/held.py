"""Which tensors a value holds, however nested, and which memory these use: storages, so that what is shared counts once."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None))
CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
SEQUENCES = (list, tuple, set, frozenset, deque)


def storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """A key that tells the tensor's storage from all others that are alive, and the storage's size in bytes: a view drags
    all of what it is cut from. None for what uses no memory itself: meta and fake tensors, and subclasses that wrap
    tensors (their inner tensors count)."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        return None
    try:
        found = tensor.untyped_storage()
        return None if found.device.type == "meta" else (found._cdata, found.nbytes())
    except (RuntimeError, NotImplementedError):  # sparse, functional and other tensors without a storage
        return None


def leaves(value: Any, modules: bool = True) -> Iterator[torch.Tensor | numpy.ndarray | torch.nn.Module]:
    """Tensors, arrays and modules that ``value`` reaches through containers and attributes, each once; not through
    properties, functions or classes. With ``modules`` also what the modules hold."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        kind = type(value)  # isinstance() would ask lazy proxies for their class, and make them load
        if issubclass(kind, (*PLAIN, *CODE)) or id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(kind, torch.Tensor | numpy.ndarray | torch.nn.Module):
            yield value
            if issubclass(kind, torch.nn.Module) and not modules:
                continue
        elif issubclass(kind, Mapping):
            waiting += value.values()
        elif issubclass(kind, SEQUENCES):
            waiting += value
        waiting += attributes(value).values()


def storages(value: Any, modules: bool = True) -> dict[tuple[str, int], tuple[int, str]]:
    """Memory that ``value`` keeps alive: (size in bytes, device) of each storage of a tensor and each NumPy buffer."""
    found: dict[tuple[str, int], tuple[int, str]] = {}
    for leaf in leaves(value, modules):
        if isinstance(leaf, torch.Tensor):
            used = storage(leaf)
            if used is not None:
                found["torch", used[0]] = used[1], str(leaf.device)
        elif isinstance(leaf, numpy.ndarray):
            while isinstance(leaf.base, numpy.ndarray):
                leaf = leaf.base
            if leaf.base is None:  # else it is a window on memory of another kind, a tensor's for one
                found["numpy", id(leaf)] = leaf.nbytes, "cpu"
    return found


def attributes(value: Any) -> dict[str, Any]:
    """What hangs on an object itself: its ``__dict__`` and its slots."""
    found = dict(getattr(value, "__dict__", None) or {}) if not isinstance(value, Mapping) else {}
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = base.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:  # not set
                    continue
    return found
