"""The key/value cache of a whole model: one buffer for all layers, or the parts that one model's code asks for.

>>> cache = ModelCache(CacheShape(36, batch=1, heads=8, max_length=2200, head_dim=128, device="cuda"))
>>> keys, values = cache.cat(layer, new_keys, new_values)  # views; nothing is allocated

``initialize_past_key_values`` is for code written for Medusa's or EAGLE's function of that name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .kv_layer import KVCache
from .kv_layouts import FP8, CacheShape, permutation
from .kv_rolling import CacheFull
from .units import GIB

__all__ = [
    "CacheFull",
    "CacheReport",
    "CacheShape",
    "KVCache",
    "LayerCache",
    "ModelCache",
    "initialize_past_key_values",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheReport:
    """What was allocated, and for which rank. As text: one line for each, with GB of 1024^3 bytes."""

    rank: int
    layers: int
    max_length: int
    nbytes: int
    buffers: int

    def __str__(self) -> str:
        return (
            f"[Rank {self.rank}] pre-allocated KV cache:\n  layers: {self.layers}\n  max length: {self.max_length}\n"
            f"  total size: {self.nbytes / GIB:.2f} GB\n  buffers: {self.buffers}"
        )


def this_rank() -> int:
    """This process's rank, 0 where nothing is distributed."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


class LayerCache(NamedTuple):
    """One layer's keys and values. They take the same rows: where one of the two cannot, neither changes."""

    key: KVCache
    value: KVCache

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """``KVCache.append`` of both. ValueError if they are not equally many rows."""
        self.write(key, value, None)

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int | torch.Tensor | None) -> None:
        """``KVCache.write`` of both at ``start``; None: behind the last row."""
        rows, also = self.key.check_rows(key), self.value.check_rows(value)
        if also != rows:
            raise ValueError(f"{rows} rows of keys and {also} of values")
        if not self.key.device_length and self.key.total_length != self.value.total_length:
            self.value.room(rows, start)
        self.key.put(key, rows, start)
        self.value.put(value, rows, start)

    def get_data(self, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``KVCache.get_data`` of both."""
        return self.key.get_data(last), self.value.get_data(last)

    def reset(self) -> None:
        """Empty both."""
        self.key.reset()
        self.value.reset()


class ModelCache:
    """The caches of all layers: ``cache[layer]`` is a ``LayerCache``, which unpacks into (key, value).

    ``buffer`` is everything in one tensor [2 * layers, *stored shape], keys and values in turn; None for a cache that
    grows, whose parts are tensors of their own. ``scales`` likewise, for FP8. Other arguments as for ``KVCache``.
    """

    def __init__(
        self, shape: CacheShape, *, when_full: str = "error", sink: int = 0, device_length: bool = False
    ) -> None:
        self.shape, self.when_full, self.device_length = shape, when_full, device_length
        count = 2 * shape.layers
        stored, device = shape.stored(), torch.device(shape.device)
        with torch.inference_mode(False):
            dtype = FP8 if shape.fp8 else shape.dtype
            apart = when_full == "grow"
            self.buffer = None if apart else torch.zeros((count, *stored), dtype=dtype, device=device)
            self.scales = scratch = positions = lengths = None
            if shape.fp8:
                self.scales = torch.zeros((count, *stored[:-1], 1), device=device)
                scratch = torch.zeros((2, *stored), dtype=shape.dtype, device=device)
            if device_length:
                positions = torch.arange(shape.max_length, device=device)
                lengths = torch.zeros(count, dtype=torch.int64, device=device)
            caches = [
                KVCache(
                    torch.zeros(stored, dtype=dtype, device=device) if self.buffer is None else self.buffer[i],
                    0 if lengths is None else lengths[i],
                    layout=shape.layout,
                    when_full=when_full,
                    sink=sink,
                    device_length=device_length,
                    scales=None if self.scales is None else self.scales[i],
                    scratch=None if scratch is None else scratch[i % 2],
                    positions=positions,
                )
                for i in range(count)
            ]
        self._lengths = lengths
        self._host_lengths = [0] * count
        if not device_length:
            for i, cache in enumerate(caches):
                cache.share_lengths(self._host_lengths, i)
        self._scratch_bytes = 0 if scratch is None else scratch.nbytes
        self.layers = tuple(LayerCache(*caches[i : i + 2]) for i in range(0, count, 2))
        log.info("%s", self.report())

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values, and for FP8 their scales and the scratch."""
        parts = [side for layer in self.layers for side in layer]
        scales = sum(side.scales.nbytes for side in parts if side.scales is not None)
        return sum(side.data.nbytes for side in parts) + scales + self._scratch_bytes

    @property
    def current_length(self) -> int | torch.Tensor:
        """Valid rows of the first layer. Never synchronises."""
        return self.layers[0].key.current_length

    def report(self, rank: int | None = None) -> CacheReport:
        """What is allocated; ``rank`` is torch.distributed's unless given. Logged when the cache is made."""
        buffers = 2 * len(self) if self.buffer is None else 1 if self.scales is None else 3
        length = self.layers[0].key.max_length
        return CacheReport(this_rank() if rank is None else rank, len(self), length, self.nbytes, buffers)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """``LayerCache.append``."""
        self.layers[layer].append(key, value)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, start: int | torch.Tensor) -> None:
        """``LayerCache.write``."""
        self.layers[layer].write(key, value, start)

    def cat(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer and return its (keys, values)."""
        self.layers[layer].append(key, value)
        return self.layers[layer].get_data()

    def get_data(self, layer: int, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's (keys, values)."""
        return self.layers[layer].get_data(last)

    def append_all(self, rows: torch.Tensor) -> None:
        """Append to all layers, which must be equally long, in one copy: ``rows`` [2 * layers, *stored shape of the rows],
        keys and values in turn. Errors as of ``KVCache.append``, before anything is written."""
        first, dim = self.layers[0].key, self.shape.length_dim + 1
        if rows.dim() != 5 or rows.shape[0] != 2 * len(self):
            raise ValueError(f"rows for {len(self)} layers are [{2 * len(self)}, ...], not {list(rows.shape)}")
        count = first.check_rows(rows[0])
        one_copy = self.when_full == "error" and not self.shape.fp8
        if not self.device_length and self._host_lengths.count(self._host_lengths[0]) != len(self._host_lengths):
            raise ValueError(f"the layers are not equally long: {self._host_lengths}")
        if not one_copy or self.device_length:
            if not self.device_length:
                first.room(count)
            for layer, (key, value) in zip(self.layers, rows.unflatten(0, (-1, 2)), strict=True):
                layer.append(key, value)
            return
        spot = first.room(count)
        self.buffer.narrow(dim, spot.at, count).copy_(rows.detach(), non_blocking=True)
        self._host_lengths[:] = [spot.length] * len(self._host_lengths)

    def reset(self) -> None:
        """Empty all layers; what is allocated stays."""
        if self._lengths is not None:
            self._lengths.zero_()
            return
        for layer in self.layers:
            layer.reset()

    def check(self) -> None:
        """``KVCache.check`` for all layers, with one synchronisation."""
        if self._lengths is not None:
            longest = int(self._lengths.argmax())
            self.layers[longest // 2][longest % 2].check()

    def as_dicts(self, indices: str = "tensor") -> list[dict[str, Any]]:
        """The buffers as Self-Forcing's and Krea realtime's models take them: one dict a layer with "k" and "v"
        [batch, length, heads, head_dim] and "global_end_index" and "local_end_index".

        The model writes into the views and keeps the two indices itself: int64 tensors [1] on the device for
        Self-Forcing (``indices="tensor"``), ints for Krea ("int"). ValueError for caches that grow or hold FP8.
        """
        if self.when_full == "grow" or self.shape.fp8:
            raise ValueError("a model that writes into the buffers itself needs a cache that neither grows nor is FP8")
        if indices not in ("tensor", "int"):
            raise ValueError(f"indices {indices!r} are neither 'tensor' nor 'int'")
        order = permutation(self.shape.layout, "blhd")

        def index() -> torch.Tensor | int:
            return torch.zeros(1, dtype=torch.int64, device=self.buffer.device) if indices == "tensor" else 0

        return [
            {
                "k": layer.key.data.permute(order),
                "v": layer.value.data.permute(order),
                "global_end_index": index(),
                "local_end_index": index(),
            }
            for layer in self.layers
        ]


def initialize_past_key_values(
    model: nn.Module, max_length: int = 2200, batch_size: int = 1
) -> tuple[list[list[KVCache]], list[torch.Tensor], torch.Tensor]:
    """Caches for a transformers-style decoder, as Medusa's and EAGLE's function of this name returns them:
    (past_key_values, past_key_values_data, current_length_data).

    ``past_key_values[layer]`` is [keys, values]; ``past_key_values_data`` has one tensor [2 * layers there, batch, heads,
    max_length, head_dim] per device that layers are on; ``current_length_data`` is int64 [2 * layers] on the CPU, and the
    caches' lengths are its elements. Reads ``model.config`` (num_hidden_layers, num_key_value_heads, head_dim, or
    hidden_size and num_attention_heads) and ``model.dtype``; ValueError where the layers cannot be found.
    """
    config = model.config
    attention_heads = config.num_attention_heads
    shape = CacheShape(
        config.num_hidden_layers,
        batch_size,
        getattr(config, "num_key_value_heads", None) or attention_heads,
        max_length,
        getattr(config, "head_dim", None) or config.hidden_size // attention_heads,
        dtype=model.dtype,
    )
    devices = [next(layer.parameters()).device for layer in _decoder_layers(model, shape.layers)]
    where = list(dict.fromkeys(devices))
    lengths = torch.zeros(2 * shape.layers, dtype=torch.int64)
    with torch.inference_mode(False):
        buffers = [
            torch.zeros((2 * devices.count(device), *shape.stored()), dtype=shape.dtype, device=device)
            for device in where
        ]
    parts = [iter(buffer) for buffer in buffers]
    caches: list[list[KVCache]] = []
    for layer, device in enumerate(devices):
        part = parts[where.index(device)]
        caches.append([KVCache(next(part), lengths[2 * layer + side]) for side in range(2)])
    log.info("%s", CacheReport(this_rank(), shape.layers, max_length, shape.nbytes, len(buffers)))
    return caches, buffers, lengths


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of ``count`` decoder layers in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and name.rsplit(".", 1)[-1] == "layers":
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers by the name 'layers'")
