"""GGUF models of WanVideoWrapper: its sampler reads the whole file anew at each run. What is packed need not be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

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
