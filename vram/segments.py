"""Where each weight of a model lies when it is packed: layers one behind the other in segments."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .discover import Layer, Slotted
from .encoded import EncodedTensor, is_encoded
from .encoding import leaves_of
from .host_memory import HostSegment
from .layout import CannotPack, Entry, align, flatten, leaves, plain_tensors, plan_tensor
from .plan import arrange
from .unit_coding import parts_of, plan_encoded


@dataclass
class PackedEntry:
    """A weight in its segment; ``signature`` is that of the patch it was packed with."""

    entry: Entry
    inner: list[torch.Tensor]
    signature: Hashable | None = None

    def move_into(self, host: HostSegment, start: int) -> None:
        """Let the module's own tensor live in the packed copy, and so release the memory it had."""
        for spec, inner in zip(self.entry.specs, plain_tensors(self.entry.host), strict=True):
            with torch.inference_mode(inner.is_inference()):
                inner.data = spec.shifted(-start).view(host.buffer_for(inner))
        self.inner = parts_of(self.entry.host)

    def leave(self) -> None:
        """Let the module's own tensor have memory of its own again, with the same contents."""
        for inner in plain_tensors(self.entry.host):
            with torch.inference_mode(inner.is_inference()):
                inner.data = inner.data.clone(memory_format=torch.preserve_format)
        self.inner = parts_of(self.entry.host)

    def lives_in(self, buffer: torch.Tensor, start: int) -> bool:
        """Whether the module's own tensor lies in the packed copy."""
        return all(
            inner.device.type == "cpu"
            and inner.dtype == spec.dtype
            and tuple(inner.shape) == spec.shape
            and (not spec.nbytes or inner.data_ptr() == buffer.data_ptr() + start + spec.offset)
            for spec, inner in zip(self.entry.specs, plain_tensors(self.entry.host), strict=True)
        )


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

    @property
    def kind(self) -> tuple:
        """What of a layer must be the same for another one to take its place."""
        return self.layer.block, tuple((id(p.entry.owner), p.entry.name, p.entry.specs) for p in self.entries)


@dataclass
class Segment:
    """A run of layers that is packed at once, of ``nbytes``, decoded ``size``: in RAM (``host``), or on another card (``away``, uint8), or not
    yet. On another card it is a copy: the weights themselves stay where they are."""

    nbytes: int
    size: int
    layers: list[PackedLayer] = field(default_factory=list)
    host: HostSegment | None = None
    away: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.host is not None or self.away is not None

    @property
    def is_encoded(self) -> bool:
        """Whether any of its layers is kept encoded."""
        return any(layer.is_encoded for layer in self.layers)

    @property
    def leaves(self) -> Iterator[torch.Tensor]:
        """The tensors that the weights are made of, see ``layout.leaves``."""
        return (leaf for layer in self.layers for packed in layer.entries for leaf in leaves(packed.entry.host))

    @property
    def unverified(self) -> list[EncodedTensor]:
        """The encoded weights that lie in it as they came from a file, and were not compared with their checksums yet."""
        entries = [packed for layer in self.layers for packed in layer.entries if packed.signature is None]
        parts = [leaf for packed in entries for leaf in leaves(packed.entry.host) if is_encoded(leaf)]
        return [leaf for leaf in parts if leaf.checksum is not None] if self.host is not None else []

    @property
    def parts(self) -> list[torch.Tensor]:
        """The weights' own plain tensors."""
        return [part for layer in self.layers for packed in layer.entries for part in packed.inner]


def lay_out(layers: Sequence[Layer]) -> tuple[list[PackedLayer], list[tuple[Slotted, str]]]:
    """Layers with their weights packed from offset 0 each, and what cannot be packed, with the reason."""
    laid_out, left_out = [], []
    for layer in layers:
        entries, nbytes, size = [], 0, 0
        coded = any(is_encoded(leaf) for leaf in leaves_of(layer))
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


def into_segments(layers: Sequence[PackedLayer], segment_bytes: int) -> list[Segment]:
    """Give each layer its place in a segment of about ``segment_bytes``."""
    segments: list[Segment] = []
    sizes = arrange([(packed.size, packed.layer.block) for packed in layers], segment_bytes)
    for packed, size in zip(layers, sizes, strict=True):
        if size.segment == len(segments):
            segments.append(Segment(0, 0))
        segment = segments[-1]
        packed.segment, packed.start, packed.place = size.segment, segment.nbytes, segment.size
        segment.layers.append(packed)
        segment.nbytes += packed.nbytes
        segment.size += packed.size
    return segments
