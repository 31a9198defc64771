"""The packed weights of a model in host memory: packed once, repacked only where a patch changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .arena import Arena, FillJob, HostSegment, copy_host, lies_as
from .coding import Coding, UnitCoding, copy_encoded, encode_part, is_encoded, parts_of, plan_encoded, unit_coding
from .discover import Layer, Slotted
from .host_budget import HostBudget
from .layout import CannotPack, Entry, align, flatten, leaves, plain_tensors, plan_tensor
from .mapped_files import MappedFile, files_behind
from .page_lock import Registrar
from .plan import LayerSize, arrange
from .staging import Piece
from .units import format_bytes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Patches:
    """Changes to weights that are made when they are packed (LoRA).

    ``signature(path)`` is None for a weight that is not patched, else a value that changes when its patch does.
    ``apply(path, tensor)`` returns the patched weight, on any device, in the dtype and shape of ``tensor``, which it
    leaves alone.
    """

    signature: Callable[[str], Hashable | None]
    apply: Callable[[str, torch.Tensor], torch.Tensor]


NO_PATCHES = Patches(lambda path: None, lambda path, tensor: tensor)


@dataclass
class PackedEntry:
    """A weight in its segment; ``signature`` is that of the patch it was packed with."""

    entry: Entry
    inner: list[torch.Tensor]
    signature: Hashable | None = None


@dataclass
class PackedLayer:
    """A layer's place: bytes ``start`` to ``start + nbytes`` of segment number ``segment``. Decoded it takes ``size`` bytes,
    from byte ``place`` of the segment's layers decoded; for a plain one that is ``nbytes`` too."""

    layer: Layer
    segment: int
    start: int
    nbytes: int
    entries: list[PackedEntry]
    place: int
    size: int

    @property
    def is_encoded(self) -> bool:
        return any(packed.entry.decoded is not None for packed in self.entries)


@dataclass
class _Segment:
    nbytes: int
    size: int
    layers: list[PackedLayer] = field(default_factory=list)
    host: HostSegment | None = None


# signature of a weight that is to be packed again, whatever its patch
_STALE = object()


class Owner(Protocol):
    """What streams from a packed model."""

    def idle(self) -> AbstractContextManager[bool]:
        """Whether no forward and no copy of the model is under way; none begins while inside. Does not wait for a forward:
        it is False then."""

    def sources_changed(self) -> None:
        """``PackedModel.source`` gives other answers than before."""


def _kind(layer: PackedLayer) -> tuple:
    """What of a layer must be the same for another one to take its place."""
    return layer.layer.block, tuple((id(p.entry.owner), p.entry.name, p.entry.specs) for p in layer.entries)


def patched(path: str, tensor: torch.Tensor, patches: Patches) -> torch.Tensor:
    """The patched weight. Raises ValueError when its shape or dtype, or that of a part, is not the original's."""
    result = patches.apply(path, tensor)
    for part, like in zip(leaves(result), leaves(tensor), strict=True):
        if part.shape != like.shape or part.dtype != like.dtype:
            raise ValueError(
                f"the patched weight {path} is {tuple(part.shape)} {part.dtype}, not {tuple(like.shape)} {like.dtype}"
            )
    return result


class PackedModel:
    """Packs layers into segments of an arena. The packed copy replaces the memory of each weight that is not patched,
    so that weights are in RAM once; the module's tensor objects stay the same ones.

    ``torn``: a ``pack`` broke off while it changed packed weights, so that some have its patches and others those before.
    Nothing may be computed with them until a ``pack`` came to its end, with whatever patches: it mends what is torn.

    ``owner`` is what streams from it while attached: then page-locked memory is lent to other models when this one is not
    computing, see host_budget.py. ``registrar`` and ``shared`` are the arena's.
    """

    def __init__(
        self,
        device: torch.device,
        layers: Sequence[Layer],
        segment_bytes: int,
        budget: int | None = None,
        *,
        registrar: Registrar | None = None,
        shared: HostBudget | None = None,
    ) -> None:
        self.arena = Arena(device, budget, registrar=registrar, shared=shared, holder=self)
        self.coding = Coding(device)
        self.layers: list[PackedLayer] = []
        self.left_out: list[tuple[Slotted, str]] = []
        self.torn = False
        self.owner: Owner | None = None
        self.last_used = self.arena.shared.use()
        self._segments: list[_Segment] = []
        self._files: list[MappedFile] = []
        self._lent = False
        self._lock = threading.RLock()
        self._plan(layers, segment_bytes)
        self.arena.shared.add(self)

    def _plan(self, layers: Sequence[Layer], segment_bytes: int) -> None:
        """Give each layer its place in a segment."""
        laid_out, self.left_out = self._lay_out(layers)
        sizes = arrange([(packed.size, packed.layer.block) for packed in laid_out], segment_bytes)
        for packed, size in zip(laid_out, sizes, strict=True):
            if size.segment == len(self._segments):
                self._segments.append(_Segment(0, 0))
            segment = self._segments[-1]
            packed.segment, packed.start, packed.place = size.segment, segment.nbytes, segment.size
            segment.layers.append(packed)
            segment.nbytes += packed.nbytes
            segment.size += packed.size
            self.layers.append(packed)

    @staticmethod
    def _lay_out(layers: Sequence[Layer]) -> tuple[list[PackedLayer], list[tuple[Slotted, str]]]:
        """Layers with their weights packed from offset 0 each, and what cannot be packed, with the reason."""
        laid_out, left_out = [], []
        for layer in layers:
            entries, nbytes, size = [], 0, 0
            coded = any(is_encoded(leaf) for slotted in layer.tensors for leaf in leaves(slotted.tensor))
            for slotted in layer.tensors:
                try:
                    parts, rebuild = flatten(slotted.tensor, decode=False)
                except CannotPack as reason:
                    left_out.append((slotted, str(reason)))
                    continue
                specs, decoded = [], []
                for part in parts:
                    specs.append(plan_encoded(part, nbytes) if is_encoded(part) else plan_tensor(part, nbytes))
                    decoded.append(plan_tensor(part, size))
                    nbytes, size = (align(spec[-1].offset + spec[-1].nbytes) for spec in (specs, decoded))
                entry = Entry(
                    slotted.path,
                    slotted.owner,
                    slotted.name,
                    slotted.tensor,
                    tuple(specs),
                    rebuild,
                    tuple(decoded) if coded else None,
                )
                entries.append(PackedEntry(entry, parts_of(slotted.tensor)))
            if entries:
                laid_out.append(PackedLayer(layer, 0, 0, nbytes, entries, 0, size))
        return laid_out, left_out

    @property
    def sizes(self) -> list[LayerSize]:
        """The layers as planning sees them."""
        return [
            LayerSize(layer.size, layer.segment, layer.layer.block, layer.nbytes if layer.is_encoded else 0)
            for layer in self.layers
        ]

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed weights, alignment included."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def host_bytes(self) -> int:
        """Bytes of RAM that the segments take."""
        return sum(segment.host.nbytes for segment in self._segments if segment.host is not None)

    def pack(self, patches: Patches = NO_PATCHES, progress: Progress | None = None) -> int:
        """Pack what is not packed yet, and repack each weight whose patch changed. Returns the bytes written.

        On an exception the module's weights are whole: what was packed stays packed. ``torn`` then says whether packed
        weights are still all of one kind. Raises FileCutOff before anything is touched, NoHostMemory where RAM is
        needed for patched weights and there is none, and what ``patches`` and ``progress`` raise.
        """
        with self._lock:
            self._files = self._files_below()
            self._check_files()
            written = self._repack(patches)
            written += self._pack_waiting(patches, progress)
            self._files = self._files_below()
            self.torn = False
            return written

    def _pack_waiting(self, patches: Patches, progress: Progress | None) -> int:
        """Pack segments that are not yet, as far as budget and RAM go. Returns the bytes written."""
        waiting = [
            (segment, self._here(segment, patches), self._must_pack(segment, patches))
            for segment in self._segments
            if segment.host is None
        ]
        planned: list[_Segment] = []
        jobs: list[FillJob] = []
        taken = self.host_bytes  # all that was packed before is page-locked again, or will be
        try:
            for segment, here, needed in waiting:
                fits = self.arena.claim(segment.nbytes, taken)
                if fits or needed:
                    taken += segment.nbytes
                    planned.append(segment)
                    fill = self._filler(segment, patches)
                    jobs.append(FillJob(segment.nbytes, fill, fits, on_calling_thread=here, optional=not needed))
        except BaseException:
            for job in jobs:
                if job.page_lock:
                    self.arena.unclaim(job.nbytes)
            raise
        total, done, written = sum(segment.nbytes for segment in planned), 0, 0

        def finished(index: int, host: HostSegment | None) -> None:
            nonlocal done, written
            segment = planned[index]
            if host is not None:
                segment.host = host
                written += segment.nbytes
                for layer in segment.layers:
                    for packed in layer.entries:
                        if packed.signature is None:
                            self._adopt(packed, host, layer.start)
                        else:
                            self.torn = True  # should a later segment fail
            done += segment.nbytes
            if progress is not None:
                progress(done, total)

        self.arena.fill(jobs, finished)
        left = sum(segment.nbytes for segment, *_ in waiting if segment.host is None)
        if left:
            log.warning(
                "%s of weights do not fit the RAM that may be page-locked (%s); they stay where they are and stream "
                "through a staging ring, which is slower",
                format_bytes(left),
                self._budget_in_words(),
            )
        return written

    def _budget_in_words(self) -> str:
        if self.arena.budget is not None:
            return format_bytes(self.arena.budget)
        return f"{format_bytes(self.arena.shared.quota())} for all models, of which {format_bytes(self.arena.shared.locked)} are used"

    def _files_below(self) -> list[MappedFile]:
        """The files that weights lie in which are not packed."""
        parts = [
            part
            for segment in self._segments
            if segment.host is None
            for layer in segment.layers
            for packed in layer.entries
            for part in packed.inner
        ]
        return files_behind(parts) if parts else []

    def _check_files(self) -> None:
        for file in self._files:
            file.check()

    @staticmethod
    def _here(segment: _Segment, patches: Patches) -> bool:
        """Whether a segment has to be packed by the calling thread: weights that are patched or come from a device."""
        return any(
            patches.signature(packed.entry.path) is not None or any(part.device.type != "cpu" for part in packed.inner)
            for layer in segment.layers
            for packed in layer.entries
        )

    def _must_pack(self, segment: _Segment, patches: Patches) -> bool:
        """Whether a segment cannot be streamed from where its weights are: patched, strided or on a device."""
        return self._here(segment, patches) or any(
            not lies_as(spec, part)
            for layer in segment.layers
            for packed in layer.entries
            for part, spec in zip(packed.inner, packed.entry.specs, strict=True)
        )

    def _filler(self, segment: _Segment, patches: Patches) -> Callable[[torch.Tensor], None]:
        def fill(buffer: torch.Tensor) -> None:
            for layer in segment.layers:
                for packed in layer.entries:
                    packed.signature = patches.signature(packed.entry.path)
                    parts = packed.inner if packed.signature is None else self._patched(packed, patches)
                    self._write(packed, parts, buffer[layer.start : layer.start + layer.nbytes], packed.signature)

        return fill

    def _write(
        self, packed: PackedEntry, parts: Sequence[torch.Tensor], buffer: torch.Tensor, signature: Hashable | None
    ) -> None:
        """The parts of a weight into its place: as they are, encoded where it is packed encoded and they are patched."""
        for spec, part, leaf in zip(packed.entry.specs, parts, leaves(packed.entry.host), strict=True):
            if not is_encoded(leaf):
                copy_host(spec, part, buffer)
            elif signature is None:
                leaf.verify()
                copy_encoded(spec, part, buffer)
            else:
                encode_part(packed.entry.path, spec, part, leaf.chunk, buffer, self.arena.device)

    @staticmethod
    def _patched(packed: PackedEntry, patches: Patches) -> list[torch.Tensor]:
        return flatten(patched(packed.entry.path, packed.entry.host, patches))[0]

    @staticmethod
    def _adopt(packed: PackedEntry, host: HostSegment, start: int) -> None:
        """Let the module's own tensor live in the packed copy, and so release the memory it had."""
        for spec, inner in zip(packed.entry.specs, plain_tensors(packed.entry.host), strict=True):
            with torch.inference_mode(inner.is_inference()):
                inner.data = spec.shifted(-start).view(host.buffer_for(inner))
        packed.inner = parts_of(packed.entry.host)

    def _repack(self, patches: Patches) -> int:
        """Bring packed segments up to date with ``patches``."""
        written = 0
        for segment in self._segments:
            if segment.host is None:
                continue
            for layer in segment.layers:
                buffer = segment.host.buffer[layer.start : layer.start + layer.nbytes]
                for packed in layer.entries:
                    signature = patches.signature(packed.entry.path)
                    if signature == packed.signature:
                        continue
                    written += self._rewrite(packed, buffer, layer.start, signature, patches, segment.host)
        return written

    def _rewrite(
        self,
        packed: PackedEntry,
        buffer: torch.Tensor,
        start: int,
        signature: Hashable | None,
        patches: Patches,
        host: HostSegment,
    ) -> int:
        specs = packed.entry.specs
        parts = packed.inner if signature is None else self._patched(packed, patches)
        if packed.signature is None:
            # the original lives in the packed copy, which is about to be overwritten
            for inner in plain_tensors(packed.entry.host):
                with torch.inference_mode(inner.is_inference()):
                    inner.data = inner.data.clone(memory_format=torch.preserve_format)
            packed.inner = parts_of(packed.entry.host)
        self.torn, packed.signature = True, _STALE  # should copying break off
        self._write(packed, parts, buffer, signature)
        packed.signature = signature
        if signature is None:
            self._adopt(packed, host, start)
        return sum(spec.nbytes for spec in specs)

    def renew(self, layers: Sequence[Layer]) -> bool:
        """Whether this is, or can be made, a packing of ``layers``: the same modules with the same kinds of weights.

        A weight that was moved, or replaced by another of its kind, since it was packed is packed again by the next
        ``pack``. False when too much is different for that; nothing is changed then.
        """
        fresh, left_out = self._lay_out(layers)
        if [(id(s.owner), s.name, id(s.tensor)) for s, _ in left_out] != [
            (id(s.owner), s.name, id(s.tensor)) for s, _ in self.left_out
        ] or [_kind(layer) for layer in fresh] != [_kind(layer) for layer in self.layers]:
            return False
        stale: list[tuple[PackedLayer, int, PackedEntry]] = []
        for mine, theirs in zip(self.layers, fresh, strict=True):
            host = self._segments[mine.segment].host
            for number, (old, new) in enumerate(zip(mine.entries, theirs.entries, strict=True)):
                in_place = host is None or old.signature is not None or self._lives_in(new, host.buffer, mine.start)
                if old.entry.host is not new.entry.host or not in_place:
                    if host is not None and not self._lives_in(new, host.buffer, mine.start):
                        new.signature = _STALE
                    stale.append((mine, number, new))
        again = [entry for _, _, entry in stale if entry.signature is _STALE]
        if sum(spec.nbytes for entry in again for spec in entry.entry.specs) * 4 > self.packed_bytes or any(
            self._overlaps(part) for entry in again for part in entry.inner
        ):
            return False
        for layer, number, entry in stale:
            layer.entries[number] = entry
        for mine, theirs in zip(self.layers, fresh, strict=True):
            mine.layer = theirs.layer
        return True

    def _overlaps(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in packed memory, where it would be overwritten while it is packed again."""
        begin = tensor.data_ptr() if tensor.device.type == "cpu" else -1
        return any(
            segment.host is not None and 0 <= begin - segment.host.buffer.data_ptr() < segment.nbytes
            for segment in self._segments
        )

    @staticmethod
    def _lives_in(packed: PackedEntry, buffer: torch.Tensor, start: int) -> bool:
        return all(
            inner.device.type == "cpu"
            and inner.dtype == spec.dtype
            and tuple(inner.shape) == spec.shape
            and (not spec.nbytes or inner.data_ptr() == buffer.data_ptr() + start + spec.offset)
            for spec, inner in zip(packed.entry.specs, plain_tensors(packed.entry.host), strict=True)
        )

    def page_lock(self) -> None:
        """Page-lock again what ``close`` unregistered, as far as the budget goes; other models that are not computing give
        back for it. To be called when the model is attached."""
        with self._lock:
            self.last_used = self.arena.shared.use()
            self._lock_again(None)
            self.arena.tell_refusals()

    def use(self) -> bool:
        """A forward of the model is about to begin. What it lent to others is page-locked again where there is room, or where
        they were last used before its own last forward. True if ``source`` changed by that. Raises FileCutOff. A few
        microseconds where nothing was lent and all is packed."""
        self._check_files()
        before, self.last_used = self.last_used, self.arena.shared.use()
        if not self._lent:
            return False
        with self._lock:
            changed = self._lock_again(before)
            self.arena.tell_refusals()
            return changed

    def _lock_again(self, older_than: int | None) -> bool:
        """Page-lock packed segments, the first ones first, until the budget is spent. True if any was."""
        changed = self._lent = False
        for segment in self._segments:
            if segment.host is None or segment.host.page_locked:
                continue
            if not self.arena.lock(segment.host, older_than):
                self._lent = True
                break
            changed = True
        return changed

    def give_back(self, nbytes: int) -> int:
        """Unlock at least ``nbytes`` of page-locked memory for another model, as far as there are as many: nothing while this
        one computes, is being attached or packed. Returns the bytes unlocked."""
        owner = self.owner
        if owner is None or not self.arena.page_locked_bytes or not self._lock.acquire(blocking=False):
            return 0
        try:
            with owner.idle() as idle:
                return self._unlock(nbytes, owner) if idle else 0
        except RuntimeError as error:  # the device is lost: its copies cannot be waited for
            log.warning("page-locked memory of a model cannot be given back: %s", error)
            return 0
        finally:
            self._lock.release()

    def _unlock(self, nbytes: int, owner: Owner) -> int:
        freed = 0
        for segment in reversed(self._segments):
            if freed >= nbytes:
                break
            if segment.host is not None and segment.host.page_locked:
                self.arena.drop(segment.host)
                freed += segment.nbytes
        self._lent = True
        owner.sources_changed()
        log.info(
            "%s of page-locked RAM go to another model; until there is room again these weights stream through a staging "
            "ring, which is slower",
            format_bytes(freed),
        )
        return freed

    def source(self, first: int, last: int) -> torch.Tensor | list[Piece]:
        """Where the bytes of layers ``first`` to ``last`` (exclusive, of one segment) are: page-locked memory as one
        tensor (where nothing is page-locked, on a CPU: packed memory), else pieces for the staging ring."""
        segment = self._segments[self.layers[first].segment]
        begin = self.layers[first].start
        end = self.layers[last - 1].start + self.layers[last - 1].nbytes
        if segment.host is not None:
            span = segment.host.buffer[begin:end]
            if segment.host.page_locked or self.arena.registrar is None:
                return span
            return [Piece(span, 0, end - begin)]
        return [
            Piece(part, layer.start - begin + spec.offset, part.numel() * part.element_size())
            for layer in self.layers[first:last]
            for packed in layer.entries
            for spec, part in zip(packed.entry.specs, packed.inner, strict=True)
        ]

    def entries(self, first: int, last: int) -> list[tuple[Entry, int]]:
        """The weights of layers ``first`` to ``last`` with the shift that binds them to a unit's own buffer."""
        begin = self.layers[first].place
        return [(packed.entry, begin - layer.place) for layer in self.layers[first:last] for packed in layer.entries]

    def coding_of(self, first: int, last: int) -> UnitCoding | None:
        """How layers ``first`` to ``last`` are decoded; None where none of them is encoded."""
        layers = self.layers[first:last]
        if not any(layer.is_encoded for layer in layers):
            return None
        buffer = getattr(self._segments[layers[0].segment].host, "buffer", None)
        return unit_coding(layers, buffer, self.arena.device)

    def close(self) -> None:
        """Unregister the page-locked memory. The weights stay in it, as ordinary memory."""
        self.owner, self._lent = None, False
        with self._lock:
            for segment in self._segments:
                if segment.host is not None:
                    self.arena.drop(segment.host)
            self.arena.tell_refusals()
