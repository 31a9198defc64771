"""Weights of a model's layers encoded before they are packed, and decoded again.

A layer is encoded as a whole, its biases and scales too, or not at all: where that leaves it smaller. Its weights become
EncodedTensors: the same tensor objects, read by whoever reads them as before, but their memory holds the encoded bytes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from .codec import Codec, NoCodec, codec_for, padded
from .codec_nvcomp import is_installed
from .config import LOSSLESS as CHOICES
from .discover import Layer
from .encoded import EncodedTensor, is_encoded
from .encoding import Made, Workers, leaves_of, thread_count
from .host_budget import process_budget
from .layout import align
from .mapped_files import files_behind
from .patches import Progress
from .unit_coding import parts_of
from .units import MIB, format_bytes
from .worth import Rates, waits_for_copies

if TYPE_CHECKING:
    from .telemetry import ForwardRecord

log = logging.getLogger(__name__)

AUTO, ON, OFF = CHOICES
AT_ONCE = 64 * MIB  # plain bytes that are decoded at once where weights go to the device for good


class Coding:
    """Which weights of a model are encoded, in place, and those that were plain before. Kept with the packed weights.
    ``for_speed``: those that are encoded are so because that is faster, and not because the user or RAM demands it.
    ``seen``: a forward of the last time that the model was attached, with plain weights."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.for_speed = False
        self.seen: ForwardRecord | None = None
        self._broken = False
        self._encoded: list[torch.Tensor] = []
        self._left: set[int] = set()  # ids of modules whose weights it did not pay to encode

    def prepare(
        self,
        choice: str,
        layers: Sequence[Layer],
        budget: int | None = None,
        progress: Progress | None = None,
        rates: Rates | None = None,
    ) -> None:
        """Encode or decode the weights of layers as a user's ``choice`` says. "on": encode what gets smaller. "auto": anything
        that gets smaller where plain weights would not fit the ``budget`` for page-locked RAM; and with ``rates``, those of
        ``faster``, what is faster that way. "off": nothing is encoded, and what comes encoded is decoded.

        Raises NoCodec for "on" where nvCOMP is missing, and for weights that come encoded and cannot be decoded here. On an
        error the model is to be given to ``decode``.
        """
        encoded = [leaf.encoded for layer in layers for leaf in leaves_of(layer) if is_encoded(leaf)]
        for file in files_behind(encoded) if encoded else ():
            file.check()  # tables of chunks are read from it soon
        codec = self._codec(choice if rates is None else ON)
        decode_all(foreign(layers, None if codec is None else codec.name), self.device)
        if codec is None:
            self._encoded.clear()
            self._left.clear()
            self.for_speed = False
            return
        must = choice == ON or sum(layer.nbytes for layer in layers) > (
            process_budget().quota() if budget is None else budget
        )
        if must and self.for_speed:
            self._left.clear()  # these did not pay, and now that is no matter
            self.for_speed = False
        rest = self._plain(layers)
        if not rest or not (must or rates is not None):
            return
        for file in files_behind([part for layer in rest for one in layer.tensors for part in parts_of(one.tensor)]):
            file.check()
        self.for_speed = not must
        workers = Workers(codec, self.device)
        try:
            self._encode(workers, rest, None if must else rates.pays, progress)
        except torch.OutOfMemoryError as reason:
            log.warning("there is no device memory left to encode weights; the others stream as they are: %s", reason)
        except (RuntimeError, MemoryError) as reason:
            if must:
                raise
            self._give_up(reason)
        finally:
            workers.release()

    def _give_up(self, reason: Exception) -> None:
        """Encoding for speed is nothing to fail for."""
        self._broken = True
        log.warning("weights are not encoded to stream faster, because that does not work here: %s", reason)

    def faster(self, layers: Sequence[Layer], record: ForwardRecord) -> Rates | None:
        """The rates of this card and link where a forward like ``record``, with plain weights, would be clearly shorter with
        encoded ones; else None. Encodes a part of one to find out, on a GPU."""
        rest = self._plain(layers)
        if not rest or not waits_for_copies(record):
            return None
        workers = Workers(codec_for(self.device), self.device)
        try:
            rates = workers.measure(max(rest, key=lambda layer: layer.nbytes))
        except torch.OutOfMemoryError as reason:
            log.info(
                "weights stay plain: there is no device memory left to find out what encoding would save: %s", reason
            )
            return None
        except (RuntimeError, MemoryError) as reason:
            self._give_up(reason)
            return None
        finally:
            workers.release()
        total = sum(layer.nbytes for layer in layers)
        return rates if rates is not None and rates.shorten(record, total) else None

    @property
    def fast(self) -> bool:
        """Whether weights are decoded about as fast as they cross the link: on a GPU, by nvCOMP."""
        return self.device.type == "cuda" and not self._broken and is_installed()

    def _plain(self, layers: Sequence[Layer]) -> list[Layer]:
        """Layers with weights that could be encoded and are not."""
        return [layer for layer in layers if id(layer.module) not in self._left and _has_plain(layer)]

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
        workers: Workers,
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
        self.for_speed, self.seen = False, None
        return bool(found)


def _has_plain(layer: Layer) -> bool:
    return any(not is_encoded(leaf) for leaf in leaves_of(layer))


def decode_all(tensors: Sequence[EncodedTensor], device: torch.device) -> None:
    """Let encoded tensor objects be the plain tensors, in host memory, decoded on ``device`` if it is a GPU. Raises Corrupt,
    NoCodec."""

    def plain(tensor: EncodedTensor) -> torch.Tensor:
        with torch.inference_mode(tensor.is_inference()), _on(device):
            return tensor.decode()

    workers = thread_count()
    with ThreadPoolExecutor(workers, thread_name_prefix="intelligent-vram-decode") as pool:
        for begin in range(0, len(tensors), workers):
            some = tensors[begin : begin + workers]
            for tensor, decoded in zip(some, pool.map(plain, some), strict=True):
                if swap(tensor, decoded) is None:
                    raise RuntimeError(f"{tensor.path} is in use elsewhere and cannot be decoded in place")


def verify_all(tensors: Sequence[EncodedTensor], progress: Progress | None = None) -> None:
    """Compare the bytes of encoded tensors with their checksums. Raises Corrupt, and what ``progress`` raises, which is told bytes."""
    waiting = [tensor for tensor in tensors if tensor.checksum is not None]
    done, total = 0, sum(len(tensor.encoded) for tensor in waiting)
    with ThreadPoolExecutor(thread_count(), thread_name_prefix="intelligent-vram-verify") as pool:
        try:
            for tensor, _ in zip(waiting, pool.map(EncodedTensor.verify, waiting), strict=True):
                done += len(tensor.encoded)
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def decoded_on(
    device: torch.device, tensors: Sequence[EncodedTensor], after_each: Callable[[], None]
) -> dict[int, torch.Tensor]:
    """The plain tensors of encoded ones, by the ids of these, decoded on ``device``, many at once. ``after_each`` is called after some
    of them. Raises Corrupt, NoCodec."""
    verify_all(tensors, lambda done, total: after_each())
    plain: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), _on(device):
        codec = codec_for(device) if tensors else None
        waiting = deque(tensors)
        while waiting:
            tensor = waiting.popleft()
            if tensor.codec != codec.name:
                plain[id(tensor)] = tensor.decode(device)
                continue
            some, size = [tensor], tensor.nbytes
            while waiting and waiting[0].codec == codec.name and size + waiting[0].nbytes <= AT_ONCE:
                some.append(waiting.popleft())
                size += some[-1].nbytes
            plain |= zip(map(id, some), _together(codec, device, some), strict=True)
            after_each()
    return plain


def _together(codec: Codec, device: torch.device, tensors: Sequence[EncodedTensor]) -> list[torch.Tensor]:
    """Plain tensors of encoded ones, in memory that they share."""
    parts, begin, size = [], 0, 0
    for tensor in tensors:
        parts.append((begin, size, tensor.chunks()))
        begin += padded(len(tensor.encoded))
        size += align(tensor.nbytes)
    encoded = torch.empty(begin, dtype=torch.uint8, device=device)
    plain = torch.empty(size, dtype=torch.uint8, device=device)
    for tensor, (at, _, _) in zip(tensors, parts, strict=True):
        encoded[at : at + len(tensor.encoded)].copy_(tensor.encoded)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    codec.batches([parts])[0].decode(encoded, plain, None, stream)
    return [
        plain[to : to + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        for tensor, (_, to, _) in zip(tensors, parts, strict=True)
    ]


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def foreign(layers: Sequence[Layer], codec: str | None) -> list[torch.Tensor]:
    """The encoded weights of layers that are not encoded by ``codec``."""
    return [leaf for layer in layers for leaf in leaves_of(layer) if is_encoded(leaf) and leaf.codec != codec]


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
