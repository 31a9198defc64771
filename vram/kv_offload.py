"""A key/value cache for sequences that do not fit the device: the newest tokens stay there, the older ones live in
page-locked host memory and come back chunk by chunk, through slots, whenever a layer attends to them.

    cache = OffloadedCache(CacheShape(30, 1, 12, 131072, 128, "blhd", device="cuda"), window=16384, chunk=8192)
    cache.append(layer, key, value)
    output = cache.attend(layer, query)          # over everything, exact

Attention over more than one chunk is bound by the link: a chunk is copied once for each time that it is read. Rows go to
the host when the window is full, a chunk at a time, beside the compute; nothing is copied back, because rows that have
left the window do not change any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .arena import Arena, FillJob
from .host_memory import HostSegment
from .kv_attention import attend
from .kv_cache import ModelCache
from .kv_layouts import CacheShape, move_left, permutation
from .kv_rolling import CacheFull
from .link import Event, open_link

SLOTS = 2


@dataclass(eq=False)
class ChunkSlot:
    """A device buffer for one chunk's keys and values, [2, *stored shape]: which (layer, chunk) it holds, when its copy is
    done, and when the compute that read it is."""

    buffer: torch.Tensor
    holds: tuple[int, int] | None = None
    ready: Event | None = None
    free: Event | None = None


class OffloadedCache:
    """Keys and values of all layers, of which at least the newest ``window`` tokens are on ``shape.device``.

    The device holds ``window + chunk`` tokens a layer, two slots and one chunk on its way out; the host holds
    ``shape.max_length - window`` tokens a layer, rounded up to chunks, allocated at once, page-locked within ``arena``'s
    budget. With the CPU as the device all copies are synchronous. All calls from one thread.

    Raises ValueError for FP8 storage or sizes that make no sense.
    """

    def __init__(self, shape: CacheShape, window: int, chunk: int | None = None, arena: Arena | None = None) -> None:
        chunk = max(1, min(window, shape.max_length - window)) if chunk is None else chunk
        if not 0 < window < shape.max_length or chunk < 1:
            raise ValueError(f"a window of {window} and chunks of {chunk} tokens, of {shape.max_length}")
        if shape.fp8:
            raise ValueError("an offloaded cache keeps rows as they are: no FP8")
        self.shape, self.window, self.chunk = shape, window, chunk
        self.device = torch.device(shape.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._link = open_link(self.device)
        self._recent = ModelCache(replace(shape, max_length=window + chunk, device=self.device))
        self._chunk_shape = (2, *shape.stored(chunk))
        self._per_layer = -(-(shape.max_length - window) // chunk)
        self._on_host = [0] * shape.layers
        self._slots = [ChunkSlot(self._device_chunk()) for _ in range(SLOTS)]
        self._outbox, self._sent = self._device_chunk(), None
        self.arena = Arena(self.device) if arena is None else arena
        self._segments: list[HostSegment] = self._allocate()
        self._host = [
            segment.buffer.view(shape.dtype).view(self._per_layer, *self._chunk_shape) for segment in self._segments
        ]
        self._reading = False

    def _device_chunk(self) -> torch.Tensor:
        count = 1
        for size in self._chunk_shape:
            count *= size
        return self._link.empty(count * self.shape.dtype.itemsize).view(self.shape.dtype).view(self._chunk_shape)

    def _allocate(self) -> list[HostSegment]:
        """One segment of host memory a layer, touched by several threads at a time."""
        nbytes = self._per_layer * self.chunk * self.shape.token_bytes
        segments: list[HostSegment | None] = [None] * self.shape.layers
        jobs = [
            FillJob(nbytes, lambda buffer: buffer.zero_(), page_lock=self.arena.claim(nbytes, layer * nbytes))
            for layer in range(self.shape.layers)
        ]
        self.arena.fill(jobs, segments.__setitem__)
        return segments

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return self._recent.nbytes + (SLOTS + 1) * self._outbox.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def page_locked(self) -> bool:
        """Whether all of the host memory is page-locked: copies from it run beside the compute. On a CPU it is never."""
        return all(segment.page_locked for segment in self._segments)

    def length(self, layer: int) -> int:
        """Tokens in ``layer``, on both sides."""
        return self._on_host[layer] * self.chunk + self._recent[layer].key.current_length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write rows behind the last one. ValueError as of ``KVCache.append``; CacheFull past ``shape.max_length``.
        Nothing is written then."""
        self.write(layer, key, value, self.length(layer))

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        """Write rows at the absolute row ``start``, which must be on the device still: ValueError if not, for a gap, and
        for a negative start."""
        recent = self._recent[layer]
        rows, also = recent.key.check_rows(key), recent.value.check_rows(value)
        length, first = self.length(layer), self._on_host[layer] * self.chunk
        if also != rows:
            raise ValueError(f"{rows} rows of keys and {also} of values")
        if start < 0 or start > length:
            raise ValueError(f"rows cannot be written at {start}: the cache has rows 0 to {length}")
        if start < first:
            raise ValueError(f"row {start} has left the device, which has rows {first} to {length}")
        if start + rows > self.shape.max_length:
            raise CacheFull(f"{rows} rows at {start} do not fit into a cache of max_length {self.shape.max_length}")
        dim, done = self.shape.length_dim, 0
        while done < rows:
            at = start + done - self._on_host[layer] * self.chunk
            if at == recent.key.max_length:
                self._send(layer)
                continue
            count = min(rows - done, recent.key.max_length - at)
            recent.write(key.narrow(dim, done, count), value.narrow(dim, done, count), at)
            done += count

    def _send(self, layer: int) -> None:
        """Send the oldest chunk of a full device part to the host, and move the window to its front.

        The chunk is copied aside first, so that the window can move while the copy to the host is under way."""
        link, compute = self._link, self._link.compute_stream()
        if self._sent is not None:
            link.compute_waits_for(self._sent, compute)
            link.give_back(self._sent)
        dim, recent = self.shape.length_dim, self._recent[layer]
        for side, target in zip(recent, self._outbox, strict=True):
            target.copy_(side.data.narrow(dim, 0, self.chunk))
        copied = link.mark(compute)
        link.copy_waits_for(copied)
        link.give_back(copied)
        link.copy(self._host[layer][self._on_host[layer]], self._outbox)
        self._sent = link.mark(link.stream)
        self._on_host[layer] += 1
        for side in recent:
            move_left(side.data, dim, self.chunk, 0, self.window)
            side.set_length(self.window)

    def chunks(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(key, value) of all tokens of ``layer``, oldest first, in the cache's layout: chunks from the host, then what is
        on the device. Views of slots: each holds until the next is asked for.

        While one is in use, the next is being copied; at the end, the first ones of the next layer. One pass at a time
        (RuntimeError), and nothing may be written to the layer during it.
        """
        if self._reading:
            raise RuntimeError("the slots serve one pass over chunks at a time")
        self._reading = True
        try:
            count, compute = self._on_host[layer], self._link.compute_stream()
            for index in range(count):
                slot = self._load(layer, index, keep=None)
                if index + 1 < count:
                    self._load(layer, index + 1, keep=slot)
                self._link.compute_waits_for(slot.ready, compute)
                try:
                    yield slot.buffer[0], slot.buffer[1]
                finally:
                    self._release(slot, compute)
            self._prefetch((layer + 1) % len(self._on_host))
            if self._recent[layer].key.current_length:
                yield self._recent[layer].get_data()
        finally:
            self._reading = False

    def attend(self, layer: int, query: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Attention of ``query`` [batch, heads, queries, head_dim] over all tokens of ``layer``, without a mask: see
        ``kv_attention.attend``."""
        order = permutation(self.shape.layout, "bhld")
        return attend(query, ((key.permute(order), value.permute(order)) for key, value in self.chunks(layer)), scale)

    def get_window(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(key, value) of the newest tokens of ``layer``, those on the device: views."""
        return self._recent[layer].get_data()

    def reset(self) -> None:
        """Empty all layers; what is allocated stays."""
        self._recent.reset()
        self._on_host = [0] * len(self._on_host)
        for slot in self._slots:
            slot.holds = None

    def close(self) -> None:
        """Wait for copies under way and give the page-locked memory back. The cache is of no more use."""
        self._link.synchronize()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for segment in self._segments:
            self.arena.drop(segment)

    def _prefetch(self, layer: int) -> None:
        """Begin to copy the first chunks of ``layer`` into the slots, all of which are free."""
        kept = None
        for index in range(min(SLOTS, self._on_host[layer])):
            kept = self._load(layer, index, keep=kept)

    def _load(self, layer: int, index: int, keep: ChunkSlot | None) -> ChunkSlot:
        """The slot that holds a chunk, or to which its copy is queued now: any but ``keep``."""
        wanted = (layer, index)
        for slot in self._slots:
            if slot.holds == wanted:
                return slot
        slot = next((s for s in self._slots if s is not keep and s.holds is None), None)
        if slot is None:
            slot = next(s for s in self._slots if s is not keep)
        link = self._link
        if slot.free is not None:
            link.copy_waits_for(slot.free)
            link.give_back(slot.free)
            slot.free = None
        if slot.ready is not None:
            link.give_back(slot.ready)
        link.copy(slot.buffer, self._host[layer][index])
        slot.holds, slot.ready = wanted, link.mark(link.stream)
        return slot

    def _release(self, slot: ChunkSlot, compute: object) -> None:
        """The compute queued so far is the last that reads the slot."""
        slot.holds = None
        slot.free = self._link.mark(compute)
