"""Lossless coding of weights: the bytes of a tensor in chunks that are encoded each on its own.

An encoded tensor is one run of bytes: a table with the encoded size of each chunk (uint32, little-endian), then the encoded
chunks, each at a multiple of 16 bytes. All chunks hold ``chunk`` plain bytes, the last one what is left. How a chunk is
encoded is the codec's: nvCOMP's ANS on a GPU (codec_nvcomp.py), zlib on byte planes on a CPU (codec_zlib.py). Neither reads
what the other wrote.

Weights in bf16 use about 2.6 of their 8 exponent bits, random and trained ones alike; the mantissa is noise. See
benchmarks/README.md for what is left and how fast it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy
import torch

from .units import KIB, MIB, format_bytes

CHUNK = 256 * KIB  # of 64 KiB to 1 MiB the one with nearly the smallest result and the fastest to decode
LARGEST_CHUNK = 16 * MIB  # what nvCOMP takes
ALIGNMENT = 16  # of encoded chunks, which nvCOMP wants
WORTH = 0.97  # a tensor that keeps a larger share of its bytes is not encoded

FLOAT16, E4M3, BYTES = KINDS = ("float16", "e4m3", "bytes")
_KIND_OF = {torch.bfloat16: FLOAT16, torch.float16: FLOAT16, torch.float8_e4m3fn: E4M3}


class Corrupt(ValueError):
    """An encoded tensor is damaged; the message names it and says what is wrong."""


class NoCodec(RuntimeError):
    """Weights cannot be encoded or decoded here; the message says what to install or to do."""


def kind_of(dtype: torch.dtype) -> str:
    """What the codecs have to know of a dtype: how its bytes are best told apart."""
    return _KIND_OF.get(dtype, BYTES)


def count_of(nbytes: int, chunk: int) -> int:
    """Chunks of a tensor of ``nbytes``."""
    return -(-nbytes // chunk)


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def table_bytes(count: int) -> int:
    """Bytes of the table of ``count`` chunks."""
    return padded(4 * count)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of an encoded tensor of ``nbytes`` plain bytes. ``sizes``: encoded bytes of each, int64 [count].

    Offsets of encoded chunks count from the begin of the table, those of plain ones from the begin of the tensor.
    """

    nbytes: int
    chunk: int
    sizes: numpy.ndarray

    @property
    def count(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> numpy.ndarray:
        """int64 [count]"""
        padded = -(-self.sizes // ALIGNMENT) * ALIGNMENT
        return table_bytes(self.count) + numpy.cumsum(padded) - padded

    @cached_property
    def encoded(self) -> int:
        """Bytes of the table and the encoded chunks."""
        return padded(int(self.offsets[-1] + self.sizes[-1])) if self.count else 0

    @cached_property
    def plain_offsets(self) -> numpy.ndarray:
        """int64 [count]"""
        return numpy.arange(self.count, dtype=numpy.int64) * self.chunk

    @cached_property
    def plain_sizes(self) -> numpy.ndarray:
        """int64 [count]"""
        return numpy.minimum(self.chunk, self.nbytes - self.plain_offsets)

    def write_table(self, target: torch.Tensor) -> None:
        """The table into the first bytes of ``target``, uint8 in host memory."""
        target[: 4 * self.count] = torch.from_numpy(self.sizes.astype("<u4").view(numpy.uint8))


def read_chunks(encoded: torch.Tensor, nbytes: int, chunk: int, name: str) -> Chunks:
    """The chunks of an encoded tensor (uint8 [n] in host memory) of ``nbytes`` plain bytes. Raises Corrupt, with ``name``,
    where its table cannot be, or says that there is more than there is: nothing outside of ``encoded`` is ever decoded."""
    if type(nbytes) is not int or type(chunk) is not int or nbytes < 0 or not 0 < chunk <= LARGEST_CHUNK:
        raise Corrupt(f"{name}: {nbytes!r:.32} bytes in chunks of {chunk!r:.32} are impossible")
    count = count_of(nbytes, chunk)
    if count and chunk % ALIGNMENT:
        raise Corrupt(f"{name}: its chunks of {chunk} bytes are no multiples of {ALIGNMENT}")
    if len(encoded) < table_bytes(count):
        raise Corrupt(f"{name}: it has {len(encoded)} bytes, fewer than the table of its {count} chunks")
    sizes = encoded.numpy()[: 4 * count].view("<u4").astype(numpy.int64)
    chunks = Chunks(nbytes, chunk, sizes)
    if count and (not sizes.all() or chunks.encoded > len(encoded)):
        raise Corrupt(
            f"{name}: the chunks of its table take {format_bytes(chunks.encoded)}, but there are {format_bytes(len(encoded))}"
        )
    return chunks


# an encoded tensor: its byte offset in a buffer of encoded ones, its byte offset in a buffer of plain ones, and its chunks
Part = tuple[int, int, Chunks]


class Codec(Protocol):
    """Encodes and decodes on one device. Safe to use from several threads."""

    name: str

    def encode(self, source: torch.Tensor, kind: str, target: torch.Tensor, chunk: int = CHUNK) -> Chunks | None:
        """Encode ``source``, uint8 [n] in host or device memory, into ``target``, uint8 in host memory, table and all; what
        was written is whole when this returns, and was decoded once and compared. None when it does not fit ``target``."""
        ...

    def decode(self, encoded: torch.Tensor, chunks: Chunks, target: torch.Tensor, name: str = "a tensor") -> None:
        """Decode ``encoded``, uint8 in host or device memory, into ``target``, uint8 [chunks.nbytes] in either, and wait for
        it. Raises Corrupt with ``name``."""
        ...

    def batches(self, units: Sequence[Sequence[Part]]) -> list[Batch]:
        """One for each of ``units``: encoded tensors that are decoded together."""
        ...


class Batch(Protocol):
    """Decodes the tensors of a unit. Makes nobody wait."""

    def decode(self, encoded: torch.Tensor, target: torch.Tensor, key: object, stream: object) -> None:
        """Queue the decoding from the buffer ``encoded`` into ``target`` on ``stream``. What is prepared for these two
        buffers is kept under ``key`` until ``forget``; None: it is used once."""
        ...

    def forget(self) -> None:
        """Buffers are going: drop what was prepared for them."""
        ...


@lru_cache(maxsize=8)
def codec_for(device: torch.device) -> Codec:
    """The codec of a device. Raises NoCodec with what to install."""
    if device.type == "cuda":
        from .codec_nvcomp import NvcompCodec

        return NvcompCodec(device)
    from .codec_zlib import ZlibCodec

    return ZlibCodec()


def codec_named(name: str) -> Codec:
    """The codec of this name that can be used here. Raises NoCodec for an unknown one and where its device is missing."""
    from . import codec_nvcomp, codec_zlib

    if name == codec_zlib.NAME:
        return codec_for(torch.device("cpu"))
    if name == codec_nvcomp.NAME:
        if not torch.cuda.is_available():
            raise NoCodec(f"weights encoded by {name} are decoded on an NVIDIA GPU, and there is none here")
        return codec_for(torch.device("cuda", torch.cuda.current_device()))
    raise NoCodec(f"weights are encoded by {name!r:.64}, which this version does not know; update it")


def room_for(nbytes: int) -> int:
    """Bytes that encoding a tensor of ``nbytes`` may take to be worth it."""
    return int(nbytes * WORTH) // ALIGNMENT * ALIGNMENT
