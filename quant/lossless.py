"""A safetensors file with its weights encoded without loss, and back again to the byte.

What the file holds is in vram/encoded_file.py; how weights are encoded, in vram/codec.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..vram.codec import CHUNK, Codec, Corrupt, codec_for, kind_of, room_for
from ..vram.encoded import checksum_of
from ..vram.encoded_file import KEY, VERSION, EncodedFile, is_encoded, open_encoded
from ..vram.inspect_weights import Unreadable
from ..vram.model_files import AGAIN, SAFETENSORS_DTYPES, Stored, read_header
from ..vram.model_headers import ModelUnreadable
from ..vram.units import KIB
from .source import Located, Refused
from .staging import ReadAhead
from .write import ALIGNMENT, whole_file, write_at

SMALLEST = 2 * KIB  # a tensor with fewer bytes is not encoded; a bias is, because a layer is encoded as a whole
AT_ONCE = 4  # tensors that are encoded, hashed or decoded at the same time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Compressed:
    """What became of a file. Sizes in bytes, of tensors without the header; ``encoded`` and ``stored``: how many are encoded
    and how many are as they were."""

    plain: int
    nbytes: int
    encoded: int
    stored: int


@dataclass(frozen=True)
class _Coded:
    """A tensor as it is written: ``data`` uint8 [n]; ``entry``: of its encoding in the metadata, None where it is plain."""

    data: torch.Tensor
    entry: dict[str, Any] | None


def compress_file(
    source: Path, target: Path, device: torch.device, *, overwrite: bool = False, progress: Progress | None = None
) -> Compressed:
    """Write ``target``: ``source``, a safetensors file, with the weights encoded that get smaller by it.

    Where ``device`` is a GPU, they are encoded there, and decoded there only; on a CPU they are encoded by zlib. Memory: a few
    tensors. Raises Unreadable, Refused (it is encoded already), NoCodec, CannotWrite and FileExistsError; nothing is left then.
    """
    tensors, metadata, begin = _read(source)
    if is_encoded(metadata):
        raise Refused(f"{source}: its weights are encoded already")
    codec = codec_for(device)
    with source.open("rb") as file:
        file.seek(8)
        header = file.read(begin - 8).decode()
    plain = sum(tensor.end - tensor.start for tensor in tensors)
    # The header comes before the data and is known after it. Room for the longest that it can be.
    longest = [_Coded(torch.empty(0), _entry(codec, 0xFFFFFFFF, "0" * 64)) for _ in tensors]
    room = len(_header(tensors, longest, [10**19] * len(tensors), header, metadata)) + 8
    room += -room % ALIGNMENT
    sizes: list[int] = []
    coded: list[_Coded] = []
    at = room
    with whole_file(target, room, overwrite=overwrite) as part:
        for tensor, one in zip(tensors, _all(source, tensors, lambda t, d: _encode(codec, t, d)), strict=True):
            write_at(part, target, at, memoryview(one.data.numpy()))
            sizes.append(len(one.data))
            coded.append(_Coded(torch.empty(0), one.entry))
            at += len(one.data)
            if progress is not None:
                progress(tensor.end - begin, plain)
        text = _header(tensors, coded, sizes, header, metadata).ljust(room - 8)
        write_at(part, target, 0, memoryview(len(text).to_bytes(8, "little") + text))
    encoded = sum(one.entry is not None for one in coded)
    return Compressed(plain, sum(sizes), encoded, len(coded) - encoded)


def decompress_file(
    source: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> EncodedFile:
    """Write ``target``: the file that ``source`` was made of, to the byte. Raises Unreadable, Corrupt (which names the
    damaged tensor), NoCodec, CannotWrite, FileExistsError."""
    file = _open(source)
    size = max((tensor.end for tensor in file.plain), default=len(file.header))
    stored = [file.stored[tensor.name] for tensor in file.plain]
    with whole_file(target, size, overwrite=overwrite) as part:
        write_at(part, target, 0, memoryview(file.header))
        for tensor, data in zip(file.plain, _all(source, stored, lambda t, d: _decode(file, t, d)), strict=True):
            write_at(part, target, tensor.start, memoryview(data.numpy()))
            if progress is not None:
                progress(tensor.end, size)
    return file


def check_file(source: Path, progress: Progress | None = None) -> EncodedFile:
    """Decode every encoded tensor and compare its SHA-256 with that of the plain one. Raises as ``decompress_file`` does."""
    file = _open(source)
    stored = [file.stored[name] for name in file.encoded]
    total = sum(tensor.end - tensor.start for tensor in stored)
    done = 0
    for tensor, _ in zip(stored, _all(source, stored, lambda t, d: _decode(file, t, d)), strict=True):
        done += tensor.end - tensor.start
        if progress is not None:
            progress(done, total)
    return file


def _open(path: Path) -> EncodedFile:
    try:
        _read(path)
        return open_encoded(path)
    except Unreadable as error:
        raise type(error)(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _read(path: Path) -> tuple[list[Stored], dict[str, Any], int]:
    """The tensors of a file in the order in which they lie there, its metadata, and the length of its header. Raises
    ModelUnreadable unless the tensors fill the file, and are as large as their dtypes and shapes say."""
    try:
        tensors, metadata, begin = read_header(path)
    except OSError as error:
        raise ModelUnreadable(f"{path}: it could not be read: {error.strerror or error}") from None
    except Unreadable as error:
        raise ModelUnreadable(f"{path}: {error}") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    at = begin
    for tensor in tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        bits = SAFETENSORS_DTYPES.get(tensor.dtype, ("", 0))[1]
        if not bits or min(tensor.shape, default=0) < 0 or tensor.start != at:
            raise ModelUnreadable(f"{path}: what its header says of {tensor.name:.100} cannot be. {AGAIN}")
        if (tensor.end - tensor.start) * 8 != elements * bits:
            raise ModelUnreadable(
                f"{path}: {tensor.name:.100} has {tensor.end - tensor.start} bytes, which is no {tensor.dtype} of shape "
                f"{list(tensor.shape)}. {AGAIN}"
            )
        at = tensor.end
    if path.stat().st_size != at:
        raise ModelUnreadable(f"{path}: it has {path.stat().st_size} bytes instead of {at}. {AGAIN}")
    return tensors, metadata, begin


def _all(path: Path, tensors: Sequence[Stored], do: Callable[[Stored, torch.Tensor], Any]) -> Iterator[Any]:
    """What ``do`` makes of each tensor and its bytes, in order, a few at the same time."""
    located = [Located(t.name, t.dtype, t.shape, path, t.start, t.end - t.start) for t in tensors]
    running: deque[Future[Any]] = deque()
    workers = max(1, min(AT_ONCE, os.cpu_count() or 1))
    with (
        ReadAhead(located, torch.device("cpu")) as reader,
        ThreadPoolExecutor(workers, thread_name_prefix="intelligent-vram-encode") as pool,
    ):
        try:
            for tensor in tensors:
                data = torch.empty(tensor.end - tensor.start, dtype=torch.uint8)
                reader.next_into(data)
                running.append(pool.submit(do, tensor, data))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _entry(codec: Codec, checksum: int, sha: str) -> dict[str, Any]:
    return {"codec": codec.name, "chunk": CHUNK, "checksum": checksum, "sha256": sha}


def _encode(codec: Codec, tensor: Stored, data: torch.Tensor) -> _Coded:
    dtype = getattr(torch, SAFETENSORS_DTYPES[tensor.dtype][0], None)
    if len(data) < SMALLEST or dtype is None:
        return _Coded(data, None)
    target = torch.zeros(room_for(len(data)), dtype=torch.uint8)
    chunks = codec.encode(data, kind_of(dtype), target)
    if chunks is None:
        return _Coded(data, None)
    encoded = target[: chunks.encoded]
    sha = hashlib.sha256(memoryview(data.numpy())).hexdigest()
    return _Coded(encoded, _entry(codec, checksum_of(encoded), sha))


def _decode(file: EncodedFile, tensor: Stored, data: torch.Tensor) -> torch.Tensor:
    """The plain bytes of a tensor of ``file``, whose stored bytes are ``data``."""
    entry = file.encoded.get(tensor.name)
    if entry is None:
        return data
    plain = file.tensor(tensor.name, data).decode(torch.device("cpu")).view(-1).view(torch.uint8)
    if hashlib.sha256(memoryview(plain.numpy())).hexdigest() != entry.sha256:
        raise Corrupt(f"{file.path}: {tensor.name} is damaged: decoded, it is not what was encoded. {AGAIN}")
    return plain


def _header(
    tensors: Sequence[Stored], coded: Sequence[_Coded], sizes: Sequence[int], plain: str, metadata: dict[str, Any]
) -> bytes:
    """The JSON of a header in which the tensors follow one another and have these ``sizes`` in bytes."""
    described = {tensor.name: one.entry for tensor, one in zip(tensors, coded, strict=True) if one.entry is not None}
    entry = json.dumps({"version": VERSION, "header": plain, "tensors": described}, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {**metadata, KEY: entry}}
    at = 0
    for tensor, one, size in zip(tensors, coded, sizes, strict=True):
        dtype, shape = (tensor.dtype, list(tensor.shape)) if one.entry is None else ("U8", [size])
        header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return json.dumps(header, separators=(",", ":")).encode()
