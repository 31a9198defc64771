"""Where each weight of a model lies when it is packed: layers one behind the other in segments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from .arena import HostSegment
from .discover import Layer, Slotted
from .layout import CannotPack, Entry, align, flatten, plan_tensor
from .plan import arrange


@dataclass
class PackedEntry:
    """A weight in its segment; ``signature`` is that of the patch it was packed with."""

    entry: Entry
    inner: list[torch.Tensor]
    signature: Hashable | None = None


@dataclass
class PackedLayer:
    """A layer's place: bytes ``start`` to ``start + nbytes`` of segment number ``segment``."""

    layer: Layer
    segment: int
    start: int
    nbytes: int
    entries: list[PackedEntry]

    @property
    def kind(self) -> tuple:
        """What of a layer must be the same for another one to take its place."""
        return self.layer.block, tuple((id(p.entry.owner), p.entry.name, p.entry.specs) for p in self.entries)


@dataclass
class Segment:
    """A run of layers that is packed at once, of ``nbytes``: in RAM (``host``), or on another card (``away``, uint8), or not
    yet. On another card it is a copy: the weights themselves stay where they are."""

    nbytes: int
    layers: list[PackedLayer] = field(default_factory=list)
    host: HostSegment | None = None
    away: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.host is not None or self.away is not None

    @property
    def parts(self) -> list[torch.Tensor]:
        """The weights' own plain tensors."""
        return [part for layer in self.layers for packed in layer.entries for part in packed.inner]


def lay_out(layers: Sequence[Layer]) -> tuple[list[PackedLayer], list[tuple[Slotted, str]]]:
    """Layers with their weights packed from offset 0 each, and what cannot be packed, with the reason."""
    laid_out, left_out = [], []
    for layer in layers:
        entries, size = [], 0
        for slotted in layer.tensors:
            try:
                parts, rebuild = flatten(slotted.tensor)
            except CannotPack as reason:
                left_out.append((slotted, str(reason)))
                continue
            specs = []
            for part in parts:
                specs.append(plan_tensor(part, size))
                size = align(specs[-1].offset + specs[-1].nbytes)
            entry = Entry(slotted.path, slotted.owner, slotted.name, slotted.tensor, tuple(specs), rebuild)
            entries.append(PackedEntry(entry, parts))
        if entries:
            laid_out.append(PackedLayer(layer, 0, 0, size, entries))
    return laid_out, left_out


def into_segments(layers: Sequence[PackedLayer], segment_bytes: int) -> list[Segment]:
    """Give each layer its place in a segment of about ``segment_bytes``."""
    segments: list[Segment] = []
    sizes = arrange([(packed.nbytes, packed.layer.block) for packed in layers], segment_bytes)
    for packed, size in zip(layers, sizes, strict=True):
        if size.segment == len(segments):
            segments.append(Segment(0))
        segment = segments[-1]
        packed.segment, packed.start = size.segment, segment.nbytes
        segment.layers.append(packed)
        segment.nbytes += packed.nbytes
    return segments
