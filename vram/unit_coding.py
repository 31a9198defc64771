"""Encoded weights in packed memory: the room that one takes there, how it gets there, and how a unit of them is decoded."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .codec import Batch, Corrupt, Part, codec_for, kind_of, padded, read_chunks
from .encoded import EncodedTensor, is_encoded
from .encoding import flat_bytes
from .layout import TensorSpec, leaves
from .units import format_bytes

if TYPE_CHECKING:
    from .segments import PackedLayer
    from .verification import Gate

SLACK = 128  # one part in so many more room than a weight takes, because it may be patched


class DoesNotFit(RuntimeError):
    """A patched weight takes more room encoded than the weight itself."""


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose bytes are packed for ``tensor``: of one that is encoded its encoded bytes."""
    return [leaf.encoded if is_encoded(leaf) else leaf.detach() for leaf in leaves(tensor)]


def plan_encoded(tensor: EncodedTensor, offset: int) -> TensorSpec:
    """The place of a weight that is packed encoded, with some room for one that is patched."""
    nbytes = tensor.chunks().encoded
    room = padded(nbytes + nbytes // SLACK + 256)
    return TensorSpec(offset, room, torch.uint8, (room,), (1,))


def copy_encoded(spec: TensorSpec, tensor: EncodedTensor, buffer: torch.Tensor) -> None:
    """Encoded bytes into their place in ``buffer``, without holding the GIL. They are verified there, later. Raises Corrupt."""
    nbytes = tensor.chunks().encoded
    if nbytes > spec.nbytes:
        raise Corrupt(f"{tensor.path} has changed since it got its place; load the model again")
    place = buffer[spec.offset : spec.offset + nbytes]
    ctypes.memmove(place.data_ptr(), tensor.encoded.data_ptr(), nbytes)
    tensor.read_again(place)


def encode_part(
    path: str, spec: TensorSpec, part: torch.Tensor, chunk: int, buffer: torch.Tensor, device: torch.device
) -> None:
    """A plain part into its place in ``buffer``, encoded. Raises DoesNotFit."""
    target = buffer[spec.offset : spec.offset + spec.nbytes]
    if codec_for(device).encode(flat_bytes(part), kind_of(part.dtype), target, chunk) is None:
        raise DoesNotFit(f"{path}, patched, does not fit the {format_bytes(spec.nbytes)} that it takes encoded")


@dataclass(frozen=True)
class UnitCoding:
    """How the bytes of a unit, as they cross the link, become its slot. ``moves``: plain runs in between: from, to, bytes.
    ``verified`` waits until they may be decoded, and raises Corrupt."""

    batch: Batch
    moves: tuple[tuple[int, int, int], ...]
    verified: Gate


def unit_codings(
    units: Sequence[tuple[Sequence[PackedLayer], torch.Tensor | None]],
    device: torch.device,
    verified: Sequence[Gate],
) -> list[UnitCoding | None]:
    """The coding of each unit: consecutive layers of a segment, and what they are packed in, or None if they are not packed yet.
    None where no layer is encoded. ``verified``: of each, see UnitCoding."""
    encoded = [number for number, (layers, _) in enumerate(units) if any(layer.is_encoded for layer in layers)]
    codings: list[UnitCoding | None] = [None] * len(units)
    if encoded:
        parts, moves = zip(*(_places(*units[number]) for number in encoded), strict=True)
        for number, batch, plain in zip(encoded, codec_for(device).batches(parts), moves, strict=True):
            codings[number] = UnitCoding(batch, plain, verified[number])
    return codings


def _places(
    layers: Sequence[PackedLayer], buffer: torch.Tensor | None
) -> tuple[list[Part], tuple[tuple[int, int, int], ...]]:
    """The encoded tensors of a unit and its plain runs, see UnitCoding."""
    first, parts, moves = layers[0], [], []
    for layer in layers:
        start, place = layer.start - first.start, layer.place - first.place
        if not layer.is_encoded:
            moves.append((start, place, layer.nbytes))
            continue
        for packed in layer.entries:
            entry = packed.entry
            for spec, to, leaf in zip(entry.specs, entry.decoded, leaves(entry.host), strict=True):
                if not is_encoded(leaf):
                    if spec.nbytes != to.nbytes:
                        raise RuntimeError(f"{entry.path} is packed encoded, and its tensor is plain")
                    moves.append((start + spec.offset, place + to.offset, spec.nbytes))
                    continue
                if packed.signature is None or buffer is None:
                    chunks = leaf.chunks()
                else:
                    patched = buffer[layer.start + spec.offset :][: spec.nbytes]
                    chunks = read_chunks(patched, to.nbytes, leaf.chunk, entry.path)
                parts.append((start + spec.offset, place + to.offset, chunks))
    return parts, tuple(moves)
