"""Threads that encode the weights of a model's layers before they are packed."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .codec import WORTH, Chunks, Codec, kind_of
from .discover import Layer
from .encoded import EncodedTensor, is_encoded
from .host_memory import HostSegment, new_memory
from .layout import leaves, plan_tensor
from .page_lock import registrar_for
from .units import KIB, MIB
from .worth import Rates

Made = list[tuple[torch.Tensor, EncodedTensor]]  # plain leaves of a layer with what they are encoded

WORKERS = 8  # of which each takes about 60 MiB of device memory
CLASSES = (torch.Tensor, nn.Parameter, EncodedTensor)  # whose memory can be replaced
MEASURABLE = 4 * MIB  # bytes of a weight at which rates are measured
SAMPLE = 64 * MIB  # bytes of it that they are measured with: fits beside a tight plan, takes long enough to be timed
IN_A_ROW, TIMES = 4, 3  # runs that are timed together, and how often
SMALL = 64 * KIB  # more than small weights take themselves, encoded


def thread_count() -> int:
    """How many threads encode, decode or verify at the same time."""
    return max(1, min(WORKERS, os.cpu_count() or 1))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a plain strided tensor as a packed copy of it holds them: uint8 [n]; its own memory where that is dense."""
    spec = plan_tensor(tensor, 0)
    tensor = tensor.detach()
    if tuple(tensor.stride()) != spec.stride or tensor.is_conj() or tensor.is_neg():
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def leaves_of(layer: Layer) -> Iterator[torch.Tensor]:
    """The tensors that the weights of a layer are made of, see ``layout.leaves``."""
    return (leaf for slotted in layer.tensors for leaf in leaves(slotted.tensor))


def _most(nbytes: int) -> int:
    """Room for the encoded form of so many bytes; what needs more is not worth encoding."""
    return nbytes + nbytes // 16 + SMALL


def _can_be_encoded(leaf: torch.Tensor) -> bool:
    return type(leaf) in CLASSES and leaf.layout is torch.strided and not leaf.is_meta


class Workers:
    """Threads that encode, each by way of page-locked memory of its own."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.count = thread_count() if device.type == "cuda" else 1
        self._codec, self._device = codec, device
        self._own = threading.local()
        self._segments: list[HostSegment] = []

    def encode(self, layer: Layer) -> Made:
        """The plain leaves of a layer with what they are encoded; empty where that is not worth it, or cannot be. Where others
        of its weights are encoded already, all are: what lies between them in a slot would have to be copied by itself."""
        everything = [(leaf, slotted.path) for slotted in layer.tensors for leaf in leaves(slotted.tensor)]
        plain = [(leaf, path) for leaf, path in everything if not is_encoded(leaf)]
        if not all(_can_be_encoded(leaf) for leaf, _ in plain):
            return []
        made, taken = [], 0
        for leaf, path in plain:
            found = self._encode(leaf)
            if found is None:
                return []
            chunks, room = found
            taken += chunks.encoded
            with torch.inference_mode(leaf.is_inference()):
                encoded = new_memory(chunks.encoded)
                ctypes.memmove(encoded.data_ptr(), room.data_ptr(), chunks.encoded)
                stride = plan_tensor(leaf, 0).stride
                name = self._codec.name
                made.append((leaf, EncodedTensor(encoded, leaf.dtype, leaf.shape, stride, name, chunks.chunk, path)))
        worth = len(plain) < len(everything) or taken <= WORTH * sum(leaf.nbytes for leaf, _ in plain)
        return made if worth else []

    def measure(self, layer: Layer) -> Rates | None:
        """The rates of this card and link, from encoding a part of a layer's largest weight, which takes little memory: a
        limit may leave no more. None where that is too small to say, or would not be encoded."""
        leaf = max(leaves_of(layer), key=lambda leaf: leaf.nbytes)
        if leaf.nbytes < MEASURABLE or is_encoded(leaf) or not _can_be_encoded(leaf):
            return None
        found = self._encode(leaf, SAMPLE)
        if found is None or found[0].encoded > WORTH * found[0].nbytes:
            return None
        chunks, source = found
        there = torch.empty_like(source, device=self._device)
        target = torch.empty(chunks.nbytes, dtype=torch.uint8, device=self._device)
        (batch,), stream = self._codec.batches([[(0, 0, chunks)]]), torch.cuda.current_stream(self._device)

        def taken(run: Callable[[], object]) -> float:
            """Seconds of one run among several in a row, the shortest of some times after a first one: what else happens only
            adds."""
            times = []
            for _ in range(1 + TIMES):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(stream)
                for _ in range(IN_A_ROW):
                    run()
                end.record(stream)
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000 / IN_A_ROW)
            return min(times[1:])

        copying = taken(lambda: there.copy_(source, non_blocking=True))
        decoding = taken(lambda: batch.decode(there, target, "here", stream))
        return Rates(chunks.encoded / copying, chunks.nbytes / decoding, chunks.encoded / chunks.nbytes)

    def _encode(self, leaf: torch.Tensor, most: int | None = None) -> tuple[Chunks, torch.Tensor] | None:
        """The chunks of a plain leaf, or of its first ``most`` bytes, and their encoded bytes, in memory of the thread's own
        until it encodes again. None where they need more than is worth it."""
        data = flat_bytes(leaf.decode() if isinstance(leaf, EncodedTensor) else leaf)[:most]
        room = self._room(_most(len(data)))
        chunks = self._codec.encode(data, kind_of(leaf.dtype), room)
        return None if chunks is None else (chunks, room[: chunks.encoded])

    def _room(self, nbytes: int) -> torch.Tensor:
        """Host memory of at least so many bytes, page-locked for a GPU: the thread's own, used again and again."""
        segment: HostSegment | None = getattr(self._own, "segment", None)
        if segment is None or segment.nbytes < nbytes:
            if segment is not None:
                segment.release()
                self._segments.remove(segment)
            segment = self._own.segment = HostSegment(nbytes)
            segment.page_lock(registrar_for(self._device))
            self._segments.append(segment)
        return segment.buffer

    def release(self) -> None:
        for segment in self._segments:
            segment.release()
