"""The packed weights of a model in host memory: packed once, repacked only where a patch changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from .arena import Arena, FillJob, Meanwhile, copy_host, lies_as
from .coding import Coding, verify_all
from .discover import Layer
from .encoded import is_encoded
from .host_budget import HostBudget
from .host_memory import HostSegment
from .layout import Entry, flatten, leaves
from .lending import Lender, Owner
from .mapped_files import MappedFile, files_behind
from .offload import OffloadDevice
from .page_lock import Registrar
from .patches import NO_PATCHES, Patches, Progress, patched
from .plan import LayerSize
from .segments import PackedEntry, PackedLayer, Segment, into_segments, lay_out
from .staging import Piece
from .unit_coding import UnitCoding, copy_encoded, encode_part, unit_codings
from .units import format_bytes
from .verification import Verification

log = logging.getLogger(__name__)

# signature of a weight that is to be packed again, whatever its patch
_STALE = object()


class PackedModel:
    """Packs layers into segments of an arena. The packed copy replaces the memory of each weight that is not patched,
    so that weights are in RAM once; the module's tensor objects stay the same ones.

    ``torn``: a ``pack`` broke off while it changed packed weights, so that some have its patches and others those before.
    Nothing may be computed with them until a ``pack`` came to its end, with whatever patches: it mends what is torn.

    ``owner`` is what streams from it while attached: then page-locked memory is lent to other models when this one is not
    computing, see lending.py. ``registrar`` and ``shared`` are the arena's. ``offload``: another card that ``pack`` copies
    segments to, as many as it has room for, instead of RAM.
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
        offload: OffloadDevice | None = None,
    ) -> None:
        self.arena = Arena(device, budget, registrar=registrar, shared=shared)
        self.offload = offload
        self.coding = Coding(device)
        self._verification = Verification()
        self.torn = False
        self.layers, self.left_out = lay_out(layers)
        self._segments = into_segments(self.layers, segment_bytes)
        self._files: list[MappedFile] = []
        self._lock = threading.RLock()
        self._lender = Lender(self.arena, self._segments, self._lock)

    @property
    def owner(self) -> Owner | None:
        return self._lender.owner

    @owner.setter
    def owner(self, owner: Owner) -> None:
        self._lender.owner = owner

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

    @property
    def away_bytes(self) -> int:
        """Bytes of another card's memory that the segments take."""
        return sum(segment.away.numel() for segment in self._segments if segment.away is not None)

    def pack(
        self,
        patches: Patches = NO_PATCHES,
        progress: Progress | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> int:
        """Pack what is not packed yet, and repack each weight whose patch changed. Returns the bytes written. ``meanwhile`` is
        called once while other threads fill memory, see ``Arena.fill``.

        On an exception the module's weights are whole: what was packed stays packed. ``torn`` then says whether packed
        weights are still all of one kind. Raises FileCutOff before anything is touched, NoHostMemory where RAM is
        needed for patched weights and there is none, and what ``patches``, ``progress`` and ``meanwhile`` raise.
        """
        with self._lock:
            self._verification.end()
            self._files = self._files_below()
            self._check_files()
            written = self._repack(patches)
            away = self._pack_away(patches, progress)
            written += away + self._pack_waiting(patches, progress, away, meanwhile)
            self._files = self._files_below()
            self.torn = False
            self._verification.begin(self._segments)
            return written

    def _pack_away(self, patches: Patches, progress: Progress | None) -> int:
        """Copy segments to the other card, as far as it has room. Returns the bytes written. What is kept encoded stays in RAM,
        where its tables are read and patched weights are encoded anew."""
        waiting = [segment for segment in self._segments if segment.away is None and not segment.is_encoded]
        if self.offload is None or not waiting:
            return 0
        room, written = self.offload.room, 0
        total = sum(segment.nbytes for segment in waiting)
        for segment in waiting:
            away = self.offload.empty(segment.nbytes) if segment.nbytes <= room else None
            if away is None:
                break
            if segment.host is not None:
                away.copy_(segment.host.buffer)
                self.arena.drop(segment.host)
            else:
                self._filler(segment, patches)(away)
            segment.away = away
            self._note_patched(segment)
            room -= segment.nbytes
            written += segment.nbytes
            if progress is not None:
                progress(written, total)
        self.offload.wait()
        if written < total:
            log.warning(
                "%s of the weights stream from %s, which has no room for the other %s: these stream from RAM",
                format_bytes(written),
                self.offload.device,
                format_bytes(total - written),
            )
        return written

    def _note_patched(self, segment: Segment) -> None:
        """A segment was filled that was not there before. Should a later one fail, its patches are ahead of the others'."""
        if any(packed.signature is not None for layer in segment.layers for packed in layer.entries):
            self.torn = True

    def _pack_waiting(
        self, patches: Patches, progress: Progress | None, before: int, meanwhile: Meanwhile | None
    ) -> int:
        """Pack segments that are not yet, as far as budget and RAM go. Returns the bytes written. ``progress`` is told them
        behind ``before``."""
        waiting = [
            (segment, self._here(segment, patches), self._must_pack(segment, patches))
            for segment in self._segments
            if not segment.packed
        ]
        planned: list[Segment] = []
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
                            packed.move_into(host, layer.start)
                self._note_patched(segment)
            done += segment.nbytes
            if progress is not None:
                progress(before + done, before + total)

        self.arena.fill(jobs, finished, meanwhile)
        left = [segment for segment, *_ in waiting if not segment.packed]
        if left:
            log.warning(
                "%s of weights do not fit the RAM that may be page-locked (%s); they stay where they are and stream "
                "through a staging ring, which is slower",
                format_bytes(sum(segment.nbytes for segment in left)),
                self._budget_in_words(),
            )
            verify_all([leaf for segment in left for leaf in segment.leaves if is_encoded(leaf)], progress)
        return written

    def _budget_in_words(self) -> str:
        if self.arena.budget is not None:
            return format_bytes(self.arena.budget)
        return f"{format_bytes(self.arena.shared.quota())} for all models, of which {format_bytes(self.arena.shared.locked)} are used"

    def _files_below(self) -> list[MappedFile]:
        """The files that weights lie in which are not packed."""
        parts = [part for segment in self._segments if not segment.packed for part in segment.parts]
        return files_behind(parts) if parts else []

    def _check_files(self) -> None:
        for file in self._files:
            file.check()

    @staticmethod
    def _here(segment: Segment, patches: Patches) -> bool:
        """Whether a segment has to be packed by the calling thread: weights that are patched or come from a device."""
        return any(
            patches.signature(packed.entry.path) is not None or any(part.device.type != "cpu" for part in packed.inner)
            for layer in segment.layers
            for packed in layer.entries
        )

    def _must_pack(self, segment: Segment, patches: Patches) -> bool:
        """Whether a segment cannot be streamed from where its weights are: patched, strided or on a device."""
        return self._here(segment, patches) or any(
            not lies_as(spec, part)
            for layer in segment.layers
            for packed in layer.entries
            for part, spec in zip(packed.inner, packed.entry.specs, strict=True)
        )

    def _filler(self, segment: Segment, patches: Patches) -> Callable[[torch.Tensor], None]:
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
                copy_encoded(spec, leaf, buffer)
            else:
                encode_part(packed.entry.path, spec, part, leaf.chunk, buffer, self.arena.device)

    @staticmethod
    def _patched(packed: PackedEntry, patches: Patches) -> list[torch.Tensor]:
        return flatten(patched(packed.entry.path, packed.entry.host, patches))[0]

    def _repack(self, patches: Patches) -> int:
        """Bring packed segments up to date with ``patches``."""
        return sum(
            self._rewrite(packed, layer, segment, signature, patches)
            for segment in self._segments
            if segment.packed
            for layer in segment.layers
            for packed in layer.entries
            if (signature := patches.signature(packed.entry.path)) != packed.signature
        )

    def _rewrite(
        self, packed: PackedEntry, layer: PackedLayer, segment: Segment, signature: Hashable | None, patches: Patches
    ) -> int:
        specs = packed.entry.specs
        parts = packed.inner if signature is None else self._patched(packed, patches)
        if packed.signature is None and segment.host is not None:
            # the original lives in the packed copy, which is about to be overwritten
            packed.leave()
        self.torn, packed.signature = True, _STALE  # should copying break off
        for buffer in (segment.host.buffer if segment.host is not None else None, segment.away):
            if buffer is not None:
                self._write(packed, parts, buffer[layer.start : layer.start + layer.nbytes], signature)
        packed.signature = signature
        if signature is None and segment.host is not None:
            packed.move_into(segment.host, layer.start)
        return sum(spec.nbytes for spec in specs)

    def renew(self, layers: Sequence[Layer]) -> bool:
        """Whether this is, or can be made, a packing of ``layers``: the same modules with the same kinds of weights.

        A weight that was moved, or replaced by another of its kind, since it was packed is packed again by the next
        ``pack``. False when too much is different for that; nothing is changed then.
        """
        fresh, left_out = lay_out(layers)
        if [(id(s.owner), s.name, id(s.tensor)) for s, _ in left_out] != [
            (id(s.owner), s.name, id(s.tensor)) for s, _ in self.left_out
        ] or [layer.kind for layer in fresh] != [layer.kind for layer in self.layers]:
            return False
        stale: list[tuple[PackedLayer, int, PackedEntry]] = []
        for mine, theirs in zip(self.layers, fresh, strict=True):
            host = self._segments[mine.segment].host
            for number, (old, new) in enumerate(zip(mine.entries, theirs.entries, strict=True)):
                in_place = host is None or old.signature is not None or new.lives_in(host.buffer, mine.start)
                if old.entry.host is not new.entry.host or not in_place:
                    if host is not None and not new.lives_in(host.buffer, mine.start):
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

    def page_lock(self) -> None:
        """Page-lock again what ``close`` unregistered, as far as the budget goes. To be called when the model is attached."""
        self._lender.attached()

    def use(self) -> bool:
        """A forward of the model is about to begin: what it lent to others comes back where it may. True if ``source``
        changed by that. Raises FileCutOff."""
        self._check_files()
        return self._lender.use()

    def source(self, first: int, last: int) -> torch.Tensor | list[Piece]:
        """Where the bytes of layers ``first`` to ``last`` (exclusive, of one segment) are: page-locked or another card's memory
        as one tensor (where nothing is page-locked, on a CPU: packed memory), else pieces for the staging ring."""
        segment = self._segments[self.layers[first].segment]
        begin = self.layers[first].start
        end = self.layers[last - 1].start + self.layers[last - 1].nbytes
        if segment.away is not None:
            return segment.away[begin:end]
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

    def codings(self, units: Sequence[tuple[int, int]]) -> list[UnitCoding | None]:
        """How units, layers ``first`` to ``last`` each, are decoded; None where none of their layers is encoded."""
        hosts = [self._segments[self.layers[first].segment].host for first, _ in units]
        places = [
            (self.layers[first:last], None if host is None else host.buffer)
            for (first, last), host in zip(units, hosts, strict=True)
        ]
        verified = [self._verification.gate(self.layers[first].segment) for first, _ in units]
        return unit_codings(places, self.arena.device, verified)

    def close(self) -> None:
        """Unregister the page-locked memory, and give back another card's. The weights stay in RAM, as ordinary memory."""
        try:
            self._verification.end()
        finally:
            self._lender.close()
            if self.away_bytes:
                for segment in self._segments:
                    segment.away = None
                self.offload.give_back()
