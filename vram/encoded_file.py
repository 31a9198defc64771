"""Safetensors files with encoded tensors: what their metadata says, and the tensors as EncodedTensor.

An encoded tensor is stored as U8 [n] under its own name. The metadata's entry ``intelligent_vram_lossless`` is a JSON object:
``version``; ``header``, the header of the file that was encoded, to the byte, which gives dtypes, shapes and offsets; and
``tensors``, for each encoded one ``codec``, ``chunk`` (plain bytes in a chunk), ``checksum`` (of the encoded bytes, encoded.py) and
``sha256`` (of the plain ones, hexadecimal). All other tensors and metadata are those of the plain file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .codec import LARGEST_CHUNK, Corrupt
from .encoded import EncodedTensor
from .model_files import AGAIN, SAFETENSORS_DTYPES, Stored, parse_header, read_header

KEY = "intelligent_vram_lossless"
VERSION = 2


@dataclass(frozen=True)
class Encoded:
    """An encoded tensor of a file: ``plain`` as it lay in the plain file, and how it is encoded."""

    plain: Stored
    codec: str
    chunk: int
    checksum: int
    sha256: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, SAFETENSORS_DTYPES[self.plain.dtype][0])


@dataclass(frozen=True)
class EncodedFile:
    """A file with encoded tensors. ``stored``: all its tensors as they lie in it, ``header``: that of the plain file with the
    8 bytes of its length, ``plain``: the tensors as they lay in that one, ``encoded``: by name, ``metadata``: of the plain file."""

    path: Path
    stored: Mapping[str, Stored]
    header: bytes
    plain: tuple[Stored, ...]
    encoded: Mapping[str, Encoded]
    metadata: Mapping[str, str]

    def tensor(self, name: str, data: torch.Tensor) -> torch.Tensor:
        """The tensor called ``name`` of its stored ``data``."""
        entry = self.encoded.get(name)
        if entry is None:
            return data
        shape = entry.plain.shape
        stride = torch.empty(shape, device="meta").stride()
        path = f"{self.path}: {name}"
        return EncodedTensor(data, entry.dtype, shape, stride, entry.codec, entry.chunk, path, entry.checksum)


def is_encoded(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a safetensors file says that it holds encoded tensors."""
    return KEY in metadata


def open_encoded(path: Path) -> EncodedFile:
    """What is in a file with encoded tensors. Raises Unreadable (it is no safetensors file), Corrupt (what it says of its
    tensors cannot be), and ValueError where it has no encoded tensors."""
    stored, metadata, _ = read_header(path)
    if not is_encoded(metadata):
        raise ValueError(f"{path}: it has no encoded tensors")
    try:
        described = json.loads(metadata[KEY])
        version = described["version"]
        header = described["header"].encode()
        plain, before, _ = parse_header(header)
        tensors = described["tensors"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(
            f"{path}: what its metadata says of encoded tensors is damaged ({error!r:.80}). {AGAIN}"
        ) from None
    if version != VERSION:
        what = "compress the plain file again" if version == 1 else "update this program"
        raise Corrupt(
            f"{path}: its weights are encoded in version {version!r:.32} of the format, not {VERSION}; {what}"
        )
    here, by_name = {tensor.name: tensor for tensor in stored}, {tensor.name: tensor for tensor in plain}
    if here.keys() != by_name.keys():
        raise Corrupt(f"{path}: its tensors are not those of the file that it was made of. {AGAIN}")
    encoded = {name: _encoded(path, name, entry, here, by_name) for name, entry in tensors}
    for name, tensor in here.items():
        if name not in encoded and (tensor.dtype, tensor.shape) != (by_name[name].dtype, by_name[name].shape):
            raise Corrupt(f"{path}: {name} is not as it was in the file that this one was made of. {AGAIN}")
    return EncodedFile(path, here, len(header).to_bytes(8, "little") + header, tuple(plain), encoded, before)


def _encoded(path: Path, name: str, entry: Any, stored: Mapping[str, Stored], plain: Mapping[str, Stored]) -> Encoded:
    try:
        found = Encoded(plain[name], entry["codec"], entry["chunk"], entry["checksum"], entry["sha256"])
        here, bits = stored[name], SAFETENSORS_DTYPES[found.plain.dtype][1]
        elements = 1
        for size in found.plain.shape:
            elements *= size
        sound = (
            type(found.codec) is str
            and type(found.sha256) is str
            and type(found.checksum) is int
            and type(found.chunk) is int
            and 0 < found.chunk <= LARGEST_CHUNK
            and here.dtype == "U8"
            and here.shape == (here.end - here.start,)
            and found.plain.end - found.plain.start == elements * bits // 8
            and hasattr(torch, SAFETENSORS_DTYPES[found.plain.dtype][0])
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise Corrupt(f"{path}: what its metadata says of {name:.100} cannot be. {AGAIN}")
    return found


def load_encoded(path: Path) -> tuple[dict[str, torch.Tensor], EncodedFile]:
    """The tensors of a file, those that are encoded as EncodedTensor over the mapped file, so that nothing is read yet. Raises
    what ``open_encoded`` does."""
    file = open_encoded(path)
    with safe_open(str(path), "pt") as opened:
        return {name: file.tensor(name, opened.get_tensor(name)) for name in file.stored}, file
