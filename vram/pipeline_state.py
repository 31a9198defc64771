"""Releases what a pipeline's state keeps alive between calls, and keeps the state from being copied.

A pipeline that is called once a block of frames hands its state from call to call. diffusers' ``ModularPipeline`` copies the
whole state at each call (``deepcopy`` in ``ModularPipeline.__call__``, diffusers 0.36 to 0.42), every frame made so far with
it. Two things cure that, and ``ReleasingPipeline`` does both:

>>> pipe = ReleasingPipeline(pipe, keep=("kv_cache",))  # what a call needs from the one before
>>> for block in range(30):
...     state = pipe(state=state, block_idx=block)  # videos, decoder_cache, ... of the call before are gone
...     show(state.get("videos")[-1])

``gc.collect``, ``empty_cache`` and ``synchronize`` between calls are not needed: what is released is used again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import held
from .units import format_bytes

log = logging.getLogger(__name__)

LARGE_NAMES = ("videos", "decoder_cache", "video_stream", "kv_cache", "crossattn_cache")


@dataclass(frozen=True)
class Released:
    """What one release did. Sizes in bytes.

    ``names``: what was released, with the memory that nothing else left in the state holds; 0 where all of it is held
    there too. ``kept``: what would have been released but is declared, with its size. ``by_device``: of ``names``.
    """

    names: Mapping[str, int]
    kept: Mapping[str, int]
    by_device: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.names.values())

    def describe(self) -> str:
        """One line in plain words."""

        def sizes(names: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {format_bytes(size)}" for name, size in names.items())

        text = f"released {format_bytes(self.nbytes)}: {sizes(self.names)}" if self.names else "nothing to release"
        return f"{text}; kept as declared: {sizes(self.kept)}" if self.kept else text


def release(
    state: Any,
    names: Collection[str] = LARGE_NAMES,
    larger_than: int | None = None,
    keep: Collection[str] = (),
) -> Released:
    """Take values out of a pipeline's state, so that nothing in it keeps their memory.

    Args:
        state: a mapping, or an object whose ``values`` is one (diffusers' ``PipelineState``). It is changed in place.
        names: values to release whatever their size; names that are not there, or None, are passed over.
        larger_than: also values that hold more than so many bytes in tensors and arrays, weights of modules not counted.
        keep: declared keys, which the next call needs: never touched.

    The memory is free once nobody outside the state holds it either. In a ``PipelineState`` the lists of names by kind, which
    grow with every call, lose what was released and what they say twice.
    Raises TypeError for a state without values, ValueError for a negative size.
    """
    names, keep = _names(names), _names(keep)
    if larger_than is not None and larger_than < 0:
        raise ValueError(f"larger_than is {larger_than}; a size in bytes is not negative")
    values = _values(state)
    dropped: dict[str, Any] = {}
    kept: dict[str, int] = {}
    for name, value in list(values.items()):
        size = sum(nbytes for nbytes, _ in held.storages(value, modules=False).values())
        if value is None or not (name in names or (larger_than is not None and size > larger_than)):
            continue
        if name in keep:
            kept[name] = size
        else:
            dropped[name] = values.pop(name)
    counted = set(held.storages(values))
    sizes: dict[str, int] = {}
    by_device: dict[str, int] = {}
    for name, value in dropped.items():
        own = {key: used for key, used in held.storages(value).items() if key not in counted}
        counted |= own.keys()
        sizes[name] = sum(nbytes for nbytes, _ in own.values())
        for nbytes, device in own.values():
            by_device[device] = by_device.get(device, 0) + nbytes
    _tidy(state, dropped)
    return Released(sizes, kept, by_device)


@contextmanager
def releasing(
    state: Any,
    names: Collection[str] = LARGE_NAMES,
    larger_than: int | None = None,
    keep: Collection[str] = (),
) -> Iterator[list[Released]]:
    """Inside the block the state holds what one call makes; before it and after it, also after an exception, nothing large.

    For pipelines that change their state in place. Yields a list: what was released on the way in, and, once the block has
    been left, on the way out. Arguments and exceptions as of ``release``.
    """
    released = [release(state, names, larger_than, keep)]
    try:
        yield released
    finally:
        released.append(release(state, names, larger_than, keep))


def needed_by(pipe: Any) -> frozenset[str]:
    """What a modular pipeline reads before any of its blocks made it, and cannot do without: the required inputs that
    ``pipe.blocks`` declares; none for other callables."""
    return frozenset(name for name, required in _inputs(pipe).items() if required)


class SharedState:
    """A state whose deep copy shares tensors, arrays and modules with it, and copies everything else; made by ``share``.

    So a call that copies its state copies nothing large. What is updated in place (a cache) changes in the older copies of
    the state as well. A value that cannot be copied (a lock, a generator, a tensor within a graph of gradients) is shared
    too, with one warning that names it.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedState:
        copied = type(self).__new__(type(self))
        copied._named = self._named
        memo[id(self)] = copied
        values = _values(self)
        for leaf in held.leaves(values, modules=False):
            memo[id(leaf)] = leaf
        if values is self:
            self._copy_values(self, copied, memo)
        for name, attribute in vars(self).items() if values is not self else ():
            if attribute is values:
                memo[id(values)] = vars(copied)[name] = type(values)()
                self._copy_values(values, memo[id(values)], memo)
            else:
                vars(copied)[name] = copy.deepcopy(attribute, memo)
        return copied

    def _copy_values(self, values: Mapping[str, Any], into: MutableMapping[str, Any], memo: dict[int, Any]) -> None:
        shared = []
        for name, value in values.items():
            trial = dict(memo)  # a copy that breaks off leaves halves behind, which no other value may meet
            try:
                into[name] = copy.deepcopy(value, trial)
            except Exception:  # whatever the value's own copying raises
                into[name] = value
                shared.append(name)
            else:
                memo.update(trial)
        if not self._named.issuperset(shared):
            log.warning(
                "the pipeline's state holds what cannot be copied, and shares it with its copies: %s",
                ", ".join(f"{name} ({type(values[name]).__name__})" for name in shared),
            )
            self._named.update(shared)


def share(state: Any) -> Any:
    """The same state as a ``SharedState`` of its own class. A ``PipelineState`` keeps its very dictionaries: what is set in
    one is set in the other. Of a dict it is a new one. Raises TypeError for a state without values."""
    if isinstance(state, SharedState):
        return state
    values = _values(state)
    shared = _shared_class(type(state)).__new__(_shared_class(type(state)))
    shared._named = set()
    if values is state:
        shared.update(state)
    else:
        vars(shared).update(vars(state))
    return shared


class ReleasingPipeline:
    """A pipeline whose state does not grow: before each call the state is released and, if it is not a plain mapping, shared.

    Args:
        pipe: a diffusers ``ModularPipeline``, or any callable whose first argument is its state or None.
        names, larger_than: what to release; see ``release``.
        keep: declared keys. Required inputs of ``pipe.blocks`` are kept without being named.
        share: whether a state that the call copies shares its tensors with the copy; see ``SharedState``.

    The state that is passed in is changed: take from it what you want to keep before the next call. ``released`` is what the
    last call did, ``released_bytes`` the sum of all. All other attributes are the pipeline's own.
    """

    def __init__(
        self,
        pipe: Any,
        names: Collection[str] = LARGE_NAMES,
        larger_than: int | None = None,
        keep: Collection[str] = (),
        share: bool = True,
    ) -> None:
        self.pipe = pipe
        self.names = _names(names)
        self.larger_than = larger_than
        self.keep = _names(keep) | needed_by(pipe)
        self.share = share
        self.released: Released | None = None
        self.released_bytes = 0
        self._carried = frozenset() if keep or names is not LARGE_NAMES else frozenset(_inputs(pipe))

    def __call__(self, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        if state is not None:
            self.released = release(state, self.names, self.larger_than, self.keep)
            self.released_bytes += self.released.nbytes
            log.info("pipeline state: %s", self.released.describe())
            self._tell_carried(self.released)
            if self.share and not isinstance(state, Mapping):
                state = share(state)
        return self.pipe(state, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not yet set: this object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def _tell_carried(self, released: Released) -> None:
        """Say once to who chose nothing that a call reads some of the default names where an earlier one left them."""
        carried = [name for name in released.names if name in self._carried]
        if carried:
            self._carried = frozenset()
            log.warning(
                "released %s, which the pipeline reads where it is there: name in keep what a call must continue from, "
                "or name in names what to release",
                ", ".join(carried),
            )


@cache
def _shared_class(base: type) -> type:
    return type(
        f"Shared{base.__name__}", (SharedState, base), {"__slots__": ("_named",), "__doc__": SharedState.__doc__}
    )


def _inputs(pipe: Any) -> dict[str, bool]:
    """Declared inputs of a modular pipeline and whether it cannot do without."""
    inputs = getattr(getattr(pipe, "blocks", None), "inputs", None) or ()
    return {entry.name: bool(entry.required) for entry in inputs if getattr(entry, "name", None)}


def _names(names: Collection[str]) -> frozenset[str]:
    if isinstance(names, str):
        raise TypeError(f"{names!r} is one name; give a list or tuple of names")
    return frozenset(names)


def _values(state: Any) -> MutableMapping[str, Any]:
    """Where a state keeps its values."""
    for values in (state, getattr(state, "values", None)):
        if isinstance(values, MutableMapping):
            return values
    raise TypeError(
        f"{type(state).__name__} is no pipeline state: neither a mapping nor an object with a mapping `values`"
    )


def _tidy(state: Any, dropped: Collection[str]) -> None:
    """``PipelineState`` notes a name in ``kwargs_mapping`` each time it is set."""
    mapping = getattr(state, "kwargs_mapping", None)
    if isinstance(mapping, MutableMapping):
        for kind, names in mapping.items():
            mapping[kind] = [name for name in dict.fromkeys(names) if name not in dropped]
