"""Weights of a model's layers encoded before they are packed, and what a unit of them takes to be decoded.

A layer is encoded as a whole, its biases and scales too, or not at all: where that leaves it smaller. Its weights become
EncodedTensors: the same tensor objects, read by whoever reads them as before, but their memory holds the encoded bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from .arena import HostSegment
from .codec import WORTH, Batch, Codec, NoCodec, codec_for, kind_of, padded, read_chunks
from .config import LOSSLESS as CHOICES
from .discover import Layer
from .encoded import EncodedTensor
from .host_budget import process_budget
from .layout import TensorSpec, leaves, plan_tensor
from .mapped_files import files_behind
from .page_lock import registrar_for
from .units import KIB, MIB, format_bytes

if TYPE_CHECKING:
    from .segments import PackedLayer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Made = list[tuple[torch.Tensor, EncodedTensor]]  # plain leaves of a layer with what they are encoded

AUTO, ON, OFF = CHOICES
WORKERS = 8  # of which each takes about 60 MiB of device memory
SLACK = 128  # one part in so many more room than a weight takes, because it may be patched
CLASSES = (torch.Tensor, nn.Parameter, EncodedTensor)  # whose memory can be replaced
MEASURABLE = 4 * MIB  # bytes of a layer at which rates are measured
SMALL = 64 * KIB  # more than small weights take themselves, encoded


class DoesNotFit(RuntimeError):
    """A patched weight takes more room encoded than the weight itself."""


# -- one weight ----------------------------------------------------------------------------------------------------------


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a plain strided tensor as a packed copy of it holds them: uint8 [n]; its own memory where that is dense."""
    spec = plan_tensor(tensor, 0)
    tensor = tensor.detach()
    if tuple(tensor.stride()) != spec.stride or tensor.is_conj() or tensor.is_neg():
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def is_encoded(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor, itself and not a part of it, holds encoded bytes."""
    return isinstance(tensor, EncodedTensor) and tensor.replaced is None


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose bytes are packed for ``tensor``: of one that is encoded its encoded bytes."""
    return [leaf.encoded if is_encoded(leaf) else leaf.detach() for leaf in leaves(tensor)]


def plan_encoded(tensor: EncodedTensor, offset: int) -> TensorSpec:
    """The place of a weight that is packed encoded, with some room for one that is patched."""
    nbytes = tensor.chunks().encoded
    room = padded(nbytes + nbytes // SLACK + 256)
    return TensorSpec(offset, room, torch.uint8, (room,), (1,))


def copy_encoded(spec: TensorSpec, encoded: torch.Tensor, buffer: torch.Tensor) -> None:
    """Encoded bytes into their place in ``buffer``, without holding the GIL."""
    ctypes.memmove(buffer.data_ptr() + spec.offset, encoded.data_ptr(), min(spec.nbytes, len(encoded)))


def encode_part(
    path: str, spec: TensorSpec, part: torch.Tensor, chunk: int, buffer: torch.Tensor, device: torch.device
) -> None:
    """A plain part into its place in ``buffer``, encoded. Raises DoesNotFit."""
    target = buffer[spec.offset : spec.offset + spec.nbytes]
    if codec_for(device).encode(flat_bytes(part), kind_of(part.dtype), target, chunk) is None:
        raise DoesNotFit(f"{path}, patched, does not fit the {format_bytes(spec.nbytes)} that it takes encoded")


# -- a unit --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitCoding:
    """How the bytes of a unit, as they cross the link, become its slot. ``moves``: plain runs in between: from, to, bytes."""

    batch: Batch
    moves: tuple[tuple[int, int, int], ...]


def unit_coding(layers: Sequence[PackedLayer], buffer: torch.Tensor | None, device: torch.device) -> UnitCoding:
    """The coding of consecutive layers of a segment, packed in ``buffer``, or not packed yet."""
    first, parts, moves = layers[0], [], []
    for layer in layers:
        start, place = layer.start - first.start, layer.place - first.place
        if not layer.is_encoded:
            moves.append((start, place, layer.nbytes))
            continue
        for packed in layer.entries:
            entry = packed.entry
            for spec, to, part, leaf in zip(entry.specs, entry.decoded, packed.inner, leaves(entry.host), strict=True):
                if not is_encoded(leaf):
                    moves.append((start + spec.offset, place + to.offset, spec.nbytes))
                    continue
                begin = layer.start + spec.offset
                data = part if buffer is None else buffer[begin : begin + spec.nbytes]
                parts.append(
                    (start + spec.offset, place + to.offset, read_chunks(data, to.nbytes, leaf.chunk, entry.path))
                )
    return UnitCoding(codec_for(device).batch(parts), tuple(moves))


# -- a model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Measured on this machine, bytes per second: of page-locked copies to the device, and of plain bytes decoded there."""

    link: float
    decoding: float

    def pays(self, plain: int, encoded: int) -> bool:
        """Whether fewer bytes on the link save more time than decoding takes."""
        return (plain - encoded) / self.link > plain / self.decoding


class Coding:
    """Which weights of a model are encoded, in place, and those that were plain before. Kept with the packed weights."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._encoded: list[torch.Tensor] = []
        self._left: set[int] = set()  # ids of modules whose weights it did not pay to encode

    def prepare(
        self,
        choice: str,
        layers: Sequence[Layer],
        budget: int | None = None,
        progress: Progress | None = None,
        *,
        for_speed: bool = True,
    ) -> None:
        """Encode or decode the weights of layers as a user's ``choice`` says. "on": encode what gets smaller. "auto": what
        is faster that way on this card and link (``for_speed``: unless speed is not what is asked for, because buffers for
        decoding take device memory), and anything that gets smaller where plain weights would not fit the ``budget`` for
        page-locked RAM. "off": nothing is encoded, and what comes encoded is decoded.

        Raises NoCodec for "on" where nvCOMP is missing, and for weights that come encoded and cannot be decoded here. On an
        error the model is to be given to ``decode``.
        """
        codec = self._codec(choice)
        decode_all(foreign(layers, None if codec is None else codec.name), self.device)
        if codec is None:
            self._encoded.clear()
            return
        rest = [layer for layer in layers if id(layer.module) not in self._left and _has_plain(layer)]
        if not rest:
            return
        for file in files_behind([part for layer in rest for one in layer.tensors for part in parts_of(one.tensor)]):
            file.check()
        workers = _Workers(codec, self.device)
        try:
            must = choice == ON or sum(layer.nbytes for layer in layers) > (
                process_budget().quota() if budget is None else budget
            )
            rates = workers.measure(max(rest, key=lambda layer: layer.nbytes)) if for_speed and not must else None
            if must or rates is not None:
                self._encode(workers, rest, None if rates is None else rates.pays, progress)
        except torch.OutOfMemoryError as reason:
            log.warning("there is no device memory left to encode weights; the others stream as they are: %s", reason)
        finally:
            workers.release()

    def _codec(self, choice: str) -> Codec | None:
        if choice == OFF or (choice == AUTO and self.device.type != "cuda"):
            return None
        try:
            return codec_for(self.device)
        except NoCodec as reason:
            if choice == ON:
                raise
            log.info("weights are streamed as they are; encoded they would take a third less: %s", reason)
            return None

    def _encode(
        self,
        workers: _Workers,
        layers: Sequence[Layer],
        pays: Callable[[int, int], bool] | None,
        progress: Progress | None,
    ) -> None:
        started = time.perf_counter()
        total, done, plain, taken = sum(layer.nbytes for layer in layers), 0, 0, 0
        with ThreadPoolExecutor(workers.count, thread_name_prefix="intelligent-vram-encode") as pool:
            try:
                # a few ahead, so that the memory of a weight is given back before many others are encoded
                running: deque[tuple[Layer, Future[Made]]] = deque()
                waiting = iter(layers)
                while running or done < total:
                    for layer in islice(waiting, 2 * workers.count - len(running)):
                        running.append((layer, pool.submit(workers.encode, layer)))
                    layer, future = running.popleft()
                    made = future.result()
                    before, after = sum(leaf.nbytes for leaf, _ in made), sum(len(new.encoded) for _, new in made)
                    if made and (pays is None or pays(before, after)) and self._take(made):
                        plain, taken = plain + before, taken + after
                    else:
                        self._left.add(id(layer.module))
                    done += layer.nbytes
                    del future, made
                    if progress is not None:
                        progress(done, total)
            finally:
                pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - started
        log.info(
            "%s of weights encoded without loss in %s (%.3f) in %.1f s, %.1f GB/s; %s stay as they are",
            format_bytes(plain),
            format_bytes(taken),
            taken / max(1, plain),
            seconds,
            total / max(seconds, 1e-9) / 1e9,
            format_bytes(total - plain),
        )

    def _take(self, made: Made) -> bool:
        """Let plain tensors be the encoded ones: all of a layer, or none."""
        taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        for plain, encoded in made:
            other = swap(plain, encoded)
            if other is None:
                for tensor, before in reversed(taken):
                    torch.utils.swap_tensors(tensor, before)
                return False
            taken.append((plain, other))
        self._encoded += [tensor for tensor, _ in taken]
        return True

    def decode(self) -> bool:
        """Let the weights that were encoded here be plain again, in host memory. Whether there were any."""
        found = list({id(tensor): tensor for tensor in self._encoded if is_encoded(tensor)}.values())
        decode_all(found, self.device)
        self._encoded.clear()
        self._left.clear()
        return bool(found)


def _has_plain(layer: Layer) -> bool:
    return any(not is_encoded(leaf) for slotted in layer.tensors for leaf in leaves(slotted.tensor))


def decode_all(tensors: Sequence[EncodedTensor], device: torch.device) -> None:
    """Let encoded tensor objects be the plain tensors, in host memory, decoded on ``device`` if it is a GPU. Raises Corrupt,
    NoCodec."""

    def plain(tensor: EncodedTensor) -> torch.Tensor:
        on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(tensor.is_inference()), on:
            return tensor.decode()

    workers = max(1, min(WORKERS, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers, thread_name_prefix="intelligent-vram-decode") as pool:
        for begin in range(0, len(tensors), workers):
            some = tensors[begin : begin + workers]
            for tensor, decoded in zip(some, pool.map(plain, some), strict=True):
                if swap(tensor, decoded) is None:
                    raise RuntimeError(f"{tensor.path} is in use elsewhere and cannot be decoded in place")


def foreign(layers: Sequence[Layer], codec: str | None) -> list[torch.Tensor]:
    """The encoded weights of layers that are not encoded by ``codec``."""
    return [
        leaf
        for layer in layers
        for slotted in layer.tensors
        for leaf in leaves(slotted.tensor)
        if is_encoded(leaf) and leaf.codec != codec
    ]


def swap(tensor: torch.Tensor, replacement: torch.Tensor) -> torch.Tensor | None:
    """Let the object ``tensor`` become ``replacement``, a Parameter if it was one, with the attributes that others hung onto
    it. Returns the object that is now what ``tensor`` was; None, and nothing is changed, where torch refuses because somebody
    else holds on to its memory."""
    with torch.inference_mode(tensor.is_inference()):
        if isinstance(tensor, nn.Parameter) and not isinstance(replacement, nn.Parameter):
            replacement = nn.Parameter(replacement, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():
        if name not in EncodedTensor.ATTRIBUTES:
            setattr(replacement, name, value)
    try:
        torch.utils.swap_tensors(tensor, replacement)
    except RuntimeError as reason:
        log.debug("a weight stays as it is: %s", reason)
        return None
    return replacement


class _Workers:
    """Threads that encode, each by way of page-locked memory of its own."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.count = max(1, min(WORKERS, os.cpu_count() or 1)) if device.type == "cuda" else 1
        self._codec, self._device = codec, device
        self._own = threading.local()
        self._segments: list[HostSegment] = []

    def encode(self, layer: Layer) -> Made:
        """The plain leaves of a layer with what they are encoded; empty where that is not worth it, or cannot be. Where others
        of its weights are encoded already, all are: what lies between them in a slot would have to be copied by itself."""
        everything = [(leaf, slotted.path) for slotted in layer.tensors for leaf in leaves(slotted.tensor)]
        plain = [(leaf, path) for leaf, path in everything if not is_encoded(leaf)]
        if any(type(leaf) not in CLASSES or not _has_bytes(leaf) for leaf, _ in plain):
            return []
        made, taken = [], 0
        for leaf, path in plain:
            data = flat_bytes(leaf.decode() if isinstance(leaf, EncodedTensor) else leaf)
            room = self._room(len(data) + len(data) // 16 + SMALL)
            chunks = self._codec.encode(data, kind_of(leaf.dtype), room)
            if chunks is None:
                return []
            taken += chunks.encoded
            with torch.inference_mode(leaf.is_inference()):
                encoded = torch.empty(chunks.encoded, dtype=torch.uint8)
                ctypes.memmove(encoded.data_ptr(), room.data_ptr(), chunks.encoded)
                stride = plan_tensor(leaf, 0).stride
                name = self._codec.name
                made.append((leaf, EncodedTensor(encoded, leaf.dtype, leaf.shape, stride, name, chunks.chunk, path)))
        worth = len(plain) < len(everything) or taken <= WORTH * sum(leaf.nbytes for leaf, _ in plain)
        return made if worth else []

    def measure(self, layer: Layer) -> Rates | None:
        """The rates of this card and link, from encoding one layer; None where that is too small to say."""
        if layer.nbytes < MEASURABLE:
            return None
        leaf = max((leaf for slotted in layer.tensors for leaf in leaves(slotted.tensor)), key=lambda leaf: leaf.nbytes)
        made = {id(plain): encoded for plain, encoded in self.encode(layer)}.get(id(leaf))
        if made is None:
            return None
        source = self._room(len(made.encoded))[: len(made.encoded)].copy_(made.encoded)
        there = torch.empty_like(source, device=self._device)
        target = torch.empty(leaf.nbytes, dtype=torch.uint8, device=self._device)
        batch, stream = self._codec.batch([(0, 0, made.chunks())]), torch.cuda.current_stream(self._device)

        def taken(run: Callable[[], object]) -> float:
            run()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        copying = taken(lambda: there.copy_(source, non_blocking=True))
        return Rates(len(source) / copying, leaf.nbytes / taken(lambda: batch.decode(there, target, "here", stream)))

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
