"""Lossless coding on a CPU, with what Python brings: the byte planes of each chunk, deflated where that is smaller.

Slow beside a GPU; with it everything else about encoded weights works, and is tested, without one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy
import torch

from .codec import CHUNK, FLOAT16, Chunks, Corrupt, Part, count_of, padded, table_bytes

NAME = "zlib-planes"
LEVEL = 1
STORED = 1 << 31  # flag in a plane's length: its bytes are as they were


def _encode(plain: memoryview, planes: int) -> bytes:
    """A byte that says how many planes, then each with its length before it (uint32)."""
    values = numpy.frombuffer(plain, numpy.uint8)
    planes = planes if len(values) % planes == 0 else 1
    parts = [bytes([planes])]
    for plane in range(planes):
        data = values[plane::planes].tobytes()
        packed = zlib.compress(data, LEVEL)
        flag, packed = (0, packed) if len(packed) < len(data) else (STORED, data)
        parts += [(len(packed) | flag).to_bytes(4, "little"), packed]
    return b"".join(parts)


def _decode(encoded: memoryview, nbytes: int) -> numpy.ndarray:
    """Raises ValueError for what ``_encode`` did not make of ``nbytes`` bytes."""
    planes = encoded[0]
    if planes not in (1, 2) or nbytes % planes:
        raise ValueError(f"{planes} planes")
    result = numpy.empty(nbytes, numpy.uint8)
    at, size = 1, nbytes // planes
    for plane in range(planes):
        head = int.from_bytes(encoded[at : at + 4], "little")
        length = head & ~STORED
        data = encoded[at + 4 : at + 4 + length]
        if len(data) != length:
            raise ValueError("a plane is cut off")
        if not head & STORED:
            inflate = zlib.decompressobj()
            data = inflate.decompress(data, size + 1)  # never more than the plane can hold
        if len(data) != size:
            raise ValueError("a plane has another size")
        result[plane::planes] = numpy.frombuffer(data, numpy.uint8)
        at += 4 + length
    if at != len(encoded):
        raise ValueError("there is more behind it")
    return result


class ZlibCodec:
    """See ``Codec``."""

    name = NAME

    def encode(self, source: torch.Tensor, kind: str, target: torch.Tensor, chunk: int = CHUNK) -> Chunks | None:
        plain = memoryview(source.cpu().numpy())
        count = count_of(len(plain), chunk)
        room = memoryview(target.numpy())
        sizes, at = [], table_bytes(count)
        for begin in range(0, len(plain), chunk):
            data = _encode(plain[begin : begin + chunk], 2 if kind == FLOAT16 else 1)
            if at + padded(len(data)) > len(room):
                return None
            room[at : at + len(data)] = data
            sizes.append(len(data))
            at += padded(len(data))
        chunks = Chunks(len(plain), chunk, numpy.array(sizes, numpy.int64))
        chunks.write_table(target)
        return chunks

    def decode(self, encoded: torch.Tensor, chunks: Chunks, target: torch.Tensor, name: str = "a tensor") -> None:
        source = memoryview(encoded.cpu().numpy())
        result = numpy.empty(chunks.nbytes, numpy.uint8)
        places = zip(chunks.offsets, chunks.sizes, chunks.plain_offsets, chunks.plain_sizes, strict=True)
        for number, (at, size, begin, nbytes) in enumerate(places):
            try:
                result[begin : begin + nbytes] = _decode(source[at : at + size], int(nbytes))
            except (ValueError, zlib.error) as error:
                raise Corrupt(f"{name}: chunk {number} of {chunks.count} is damaged ({error})") from None
        target.copy_(torch.from_numpy(result))

    def batches(self, units: Sequence[Sequence[Part]]) -> list[ZlibBatch]:
        return [ZlibBatch(self, parts) for parts in units]


class ZlibBatch:
    """See ``Batch``. A CPU decodes at once."""

    def __init__(self, codec: ZlibCodec, parts: Sequence[Part]) -> None:
        self._codec = codec
        self._parts = parts

    def decode(self, encoded: torch.Tensor, target: torch.Tensor, key: object, stream: object) -> None:
        for source, destination, chunks in self._parts:
            self._codec.decode(
                encoded[source : source + chunks.encoded], chunks, target[destination : destination + chunks.nbytes]
            )

    def forget(self) -> None:
        """Nothing is prepared."""
