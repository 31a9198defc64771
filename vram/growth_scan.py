"""Which tensors are alive, by shape, dtype and device, and what holds them: read from Python's garbage collector.

A scan looks at every object that Python tracks: 0.26 s with a million of them, as a ComfyUI process has. Tensors that only
C++ holds (saved for gradients, in the pools of CUDA graphs) are not seen.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import held

DEPTH = 8  # containers from a tensor to what names it
MOST_HOLDERS = 200  # at each of them
LONGEST = 100_000  # items of a container that is looked into
SKIPPED = (types.FrameType, types.TracebackType, types.MappingProxyType, type(iter([])), type(iter(())))


@dataclass(frozen=True)
class Kind:
    """Tensors that look the same. Where several share a storage the largest stands for it."""

    shape: tuple[int, ...]
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype} on {self.device}"


@dataclass(frozen=True)
class Scan:
    """The tensors alive at one moment: (how many storages, their bytes) of each kind, and the keys of all storages."""

    kinds: Mapping[Kind, tuple[int, int]]
    keys: frozenset[int]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.kinds.values())

    def on(self, device: str) -> int:
        """Bytes of storages on a device ("cuda:0")."""
        return sum(nbytes for kind, (_, nbytes) in self.kinds.items() if kind.device == device)


def scan() -> Scan:
    """Look at all tensors that Python knows. Nothing is kept alive."""
    kinds: dict[Kind, tuple[int, int]] = {}
    found = _live()
    for tensor, nbytes in found.values():
        kind = kind_of(tensor)
        count, total = kinds.get(kind, (0, 0))
        kinds[kind] = count + 1, total + nbytes
    return Scan(kinds, frozenset(found))


def samples(kinds: Collection[Kind], known: Collection[int], most: int = 3) -> tuple[list[torch.Tensor], list[Kind]]:
    """Up to ``most`` living tensors of each of these kinds whose storages are not ``known``, and the kind of each. Old ones
    rather than new ones, which may be about to go. Nothing but the first list holds them."""
    tensors: list[torch.Tensor] = []
    found: list[Kind] = []
    for key, (tensor, _) in _live().items():
        if key in known:
            continue
        kind = kind_of(tensor)
        if kind in kinds and found.count(kind) < most:
            tensors.append(tensor)
            found.append(kind)
    return tensors, found


def kind_of(tensor: torch.Tensor) -> Kind:
    """The kind that a tensor belongs to."""
    return Kind(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device))


def _live() -> dict[int, tuple[torch.Tensor, int]]:
    """Each storage with the largest tensor over it and its bytes."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    for tensor in gc.get_objects():
        if not issubclass(type(tensor), torch.Tensor):  # isinstance() would ask lazy proxies for their class
            continue
        used = held.storage(tensor)
        if used is not None and used[1] and (used[0] not in found or found[used[0]][0].numel() < tensor.numel()):
            found[used[0]] = tensor, used[1]
    return found


@dataclass(frozen=True, slots=True)
class _Step:
    """An object on the way from a tensor to what names it: whose way, the way so far, and the object."""

    sample: int
    path: str
    target: Any


def holders(targets: Sequence[Any]) -> list[str | None]:
    """For each object a name of what holds it, from the nearest module or instance on: ``Pipe.state['videos'][*]``.

    ``[*]`` is any place in a list. ``(local)`` begins where only a local variable holds the container; None where nothing
    that Python tracks holds the object itself: a local variable, or C++.
    """
    names: list[str | None] = [None] * len(targets)
    deepest: dict[int, str] = {}
    steps = [_Step(index, "", target) for index, target in enumerate(targets)]
    visited = {id(targets)}
    for _ in range(DEPTH):
        by_id: dict[int, list[_Step]] = {}
        for step in steps:
            by_id.setdefault(id(step.target), []).append(step)
        visited |= by_id.keys()
        steps = []
        for holder in gc.get_referrers(*(found[0].target for found in by_id.values())):
            if id(holder) in visited or issubclass(type(holder), (*SKIPPED, _Step)):
                continue
            for step, path, ended in _through(holder, by_id):
                if names[step.sample] is None and ended:
                    names[step.sample] = path
                elif names[step.sample] is None and len(steps) < MOST_HOLDERS:
                    steps.append(_Step(step.sample, path, holder))
                    deepest[step.sample] = path
        steps = [step for step in steps if names[step.sample] is None]
        if not steps:
            break
    return [name or (f"(local){deepest[index]}" if index in deepest else None) for index, name in enumerate(names)]


def _through(holder: Any, by_id: Mapping[int, list[_Step]]) -> Iterator[tuple[_Step, str, bool]]:
    """The ways on through one holder: (the way so far, the longer way, whether it ends in a name)."""
    kind = type(holder)
    if issubclass(kind, dict):
        module = holder.get("__name__") if "__builtins__" in holder or _is_module(holder) else None
        for key, value in _few(holder.items()):
            for step in by_id.get(id(value), ()):
                yield step, f"{module}.{key}{step.path}" if module else f"[{key!r}]{step.path}", module is not None
    elif issubclass(kind, tuple | list | deque | set | frozenset):
        for step in {id(step): step for value in _few(holder) for step in by_id.get(id(value), ())}.values():
            yield step, f"[*]{step.path}", False
    elif issubclass(kind, types.CellType):
        for step in by_id.get(id(holder.cell_contents), ()):
            yield step, step.path, False
    elif issubclass(kind, types.FunctionType):
        for part, values in (("closure", holder.__closure__), ("defaults", holder.__defaults__)):
            for step in by_id.get(id(values), ()) if values else ():
                yield step, f"({part} of {holder.__qualname__}){step.path.removeprefix('[*]')}", True
    elif issubclass(kind, types.GeneratorType | types.CoroutineType):
        for step in (step for steps in by_id.values() for step in steps):
            if any(value is step.target for value in gc.get_referents(holder)):
                yield step, f"({holder.__qualname__}){step.path}", True
    elif issubclass(kind, type):
        for namespace in gc.get_referents(holder):
            for step in by_id.get(id(namespace), ()) if type(namespace) is dict else ():
                yield step, f"{holder.__qualname__}{_as_attribute(step.path)}", True
    else:
        yield from _instance(holder, by_id)


def _instance(holder: Any, by_id: Mapping[int, list[_Step]]) -> Iterator[tuple[_Step, str, bool]]:
    attributes = getattr(holder, "__dict__", None)
    name = type(holder).__name__
    for step in by_id.get(id(attributes), ()) if type(attributes) is dict else ():
        yield step, f"{name}{_as_attribute(step.path)}", True
    for key, value in held.attributes(holder).items():
        for step in by_id.get(id(value), ()):
            yield step, f"{name}.{key}{step.path}", True


def _as_attribute(path: str) -> str:
    """A way that begins in a namespace: ``['videos'][*]`` is ``.videos[*]``."""
    name, _, rest = path.removeprefix("['").partition("']")
    return f".{name}{rest}"


def _is_module(namespace: Mapping[str, Any]) -> bool:
    name = namespace.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return module is not None and vars(module) is namespace


def _few(items: Collection[Any]) -> list[Any]:
    return list(items) if len(items) <= LONGEST else []
