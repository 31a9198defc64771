"""GGUF models of WanVideoWrapper: its sampler reads the whole file anew at each run. What is packed need not be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..packing import PackedModel
from ..units import format_bytes

log = logging.getLogger(__name__)

READERS = "gguf_reader"


@dataclass(frozen=True)
class _Remaining:
    """Stands for a reader of which some tensors are left out."""

    tensors: list[Any]


class Readers(list):
    """The wrapper's list of GGUF readers, as it is but for tensors named by ``packed()`` at the time of reading."""

    def __init__(self, readers: list[Any], packed: Callable[[], Collection[str]]) -> None:
        super().__init__(readers)
        self._packed = packed

    def __iter__(self) -> Iterator[Any]:
        packed = self._packed()
        left_out = 0
        for reader in super().__iter__():
            left_out += sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name in packed)
            yield _Remaining([tensor for tensor in reader.tensors if tensor.name not in packed]) if packed else reader
        if left_out:
            log.info("block swap: %s of the GGUF file are packed in RAM and are not read again", format_bytes(left_out))


def forget_weights(packed: PackedModel) -> None:
    """Let the sampler read packed GGUF weights again. It passes by those that are there, wherever they are, so it has to
    find what its own offloading leaves: an empty parameter with the type of quantization."""
    for layer in packed.layers:
        for entry in (packed_entry.entry for packed_entry in layer.entries):
            if hasattr(entry.host, "quant_type") and entry.owner.get(entry.name) is entry.host:
                empty = nn.Parameter(torch.empty(0, dtype=entry.host.dtype), requires_grad=False)
                empty.quant_type = entry.host.quant_type
                entry.owner[entry.name] = empty
