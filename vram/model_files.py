"""Model files, inspected without reading a weight: safetensors by its header, GGUF and what torch.save wrote by mapping.

Is the file whole, do its tensors fit what is said of them, where do they begin, and what do its FP8 layers need.
Format of safetensors: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .contiguity import ALIGNMENT
from .inspect_weights import (
    Facts,
    Issue,
    Report,
    Unreadable,
    check_fp8,
    fp8_weights,
    inspect_tensors,
    promised_scales,
)

# name in a safetensors header: torch's name, bits an element
SAFETENSORS_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
}
MAX_HEADER = 100_000_000  # what the safetensors library allows
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
FORMATS = (".safetensors", ".sft", ".gguf", *PICKLED)


# -- safetensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header describes it; ``start`` and ``end`` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[list[Stored], dict[str, Any], int]:
    """The tensors, the metadata and the length (with its 8 bytes of size) of a safetensors header. Raises Unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > MAX_HEADER:
            raise Unreadable(_not_safetensors(head + file.read(56)))
        if 8 + length > size:
            raise Unreadable(f"it ends inside its header, at {size} of {8 + length} bytes. Download or copy it again")
        encoded = file.read(length)
    try:
        header = json.loads(encoded)
        metadata = header.pop("__metadata__", None) or {}
        begin = 8 + length
        tensors = [
            Stored(
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                *(begin + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(f"its header is not one of safetensors ({error!r}). Download or copy it again") from None
    return tensors, metadata, begin


def _not_safetensors(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the model. Download the file itself (git lfs pull)"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, not the model. Download it again, signed in if its source asks for that"
    return "it is not a safetensors file: its first 8 bytes give no possible size of a header"


def check_offsets(tensors: list[Stored], begin: int, size: int) -> Iterator[Issue]:
    """Whether the tensors of a safetensors file of ``size`` bytes, whose data starts at ``begin``, fill it exactly, fit
    their shapes, and where they begin."""
    reached = begin
    for tensor in sorted(tensors, key=lambda stored: (stored.start, stored.end)):
        name, bits = SAFETENSORS_DTYPES.get(tensor.dtype, (None, 8))
        wanted = math.prod(tensor.shape) * bits // 8
        found = tensor.end - tensor.start
        if name is None:
            yield Issue(tensor.name, f"its dtype {tensor.dtype} is none of safetensors'", "malformed")
        elif found != wanted or tensor.start < begin:
            problem = f"{tensor.dtype} of shape {list(tensor.shape)} needs {wanted} bytes, it has {found}"
            yield Issue(tensor.name, problem, "malformed")
        if tensor.end > size:
            yield Issue(tensor.name, f"needs bytes {tensor.start} to {tensor.end} of a file of {size}", "cut_off")
        if tensor.start > reached:
            yield Issue(tensor.name, f"{tensor.start - reached} unused bytes before it", "gap")
        elif tensor.start < reached and found > 0:
            yield Issue(tensor.name, f"begins {reached - tensor.start} bytes before the end of another", "overlap")
        reached = max(reached, tensor.end)
        element = max(1, bits // 8)
        if found and tensor.start % element:
            problem = f"begins at byte {tensor.start}, which is no multiple of the {element} bytes of its elements"
            yield Issue(tensor.name, problem, "split_elements")
        elif found and tensor.start % ALIGNMENT:
            problem = f"begins {tensor.start % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
            yield Issue(tensor.name, problem, "mapped_misaligned")
    if size > reached:
        yield Issue("(end of the file)", f"{size - reached} bytes after the last tensor", "gap")


def _inspect_safetensors(path: Path) -> Report:
    tensors, metadata, begin = read_header(path)
    facts = {t.name: Facts(SAFETENSORS_DTYPES.get(t.dtype, (t.dtype,))[0], t.shape) for t in tensors}
    fp8 = fp8_weights(facts)
    issues = [*check_offsets(tensors, begin, path.stat().st_size), *check_fp8(fp8, promised_scales(facts, metadata))]
    nbytes = sum(max(0, tensor.end - tensor.start) for tensor in tensors)
    return Report(str(path), "safetensors", len(tensors), nbytes, tuple(issues), tuple(fp8))


# -- files ---------------------------------------------------------------------------------------------------------------


def inspect_file(path: str | os.PathLike[str]) -> Report:
    """Inspect a model file: safetensors, GGUF (with the ``gguf`` package), or what torch.save wrote. Raises Unreadable."""
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            raise Unreadable("it is a folder; name the files in it" if path.is_dir() else "there is no such file")
        if suffix == ".gguf":
            return _inspect_gguf(path)
        if suffix in PICKLED:
            return _inspect_pickled(path)
        if suffix in FORMATS:
            return _inspect_safetensors(path)
    except OSError as error:
        raise Unreadable(f"it could not be read: {error.strerror or error}") from None
    raise Unreadable(f"{suffix or 'a name without ending'} is no known format; known are {', '.join(FORMATS)}")


def _inspect_gguf(path: Path) -> Report:
    try:
        import gguf
    except ImportError:
        raise Unreadable("reading GGUF needs the gguf package: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise Unreadable(f"it is no GGUF file, or cut off ({error}). Download or copy it again") from None
    alignment = int(reader.alignment)
    issues = [
        Issue(
            tensor.name, f"begins {past} bytes past a multiple of {alignment}, the file's alignment", "split_elements"
        )
        for tensor in reader.tensors
        if (past := int(tensor.data_offset) % alignment)
    ]
    nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    return Report(str(path), "GGUF", len(reader.tensors), nbytes, tuple(issues), ())


def _inspect_pickled(path: Path) -> Report:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise Unreadable(
            "it holds other objects than tensors, which could run code when loaded, and was not loaded. Convert it to "
            "safetensors where you trust it"
        ) from None
    except (RuntimeError, OSError) as error:
        old = "mmap can only be used" in str(error)
        reason = "torch.save has not written files like it since version 1.6" if old else str(error).partition(". ")[0]
        raise Unreadable(
            f"torch cannot map it ({reason}); it may be cut off. Download or copy it again, or convert it to safetensors"
        ) from None
    return inspect_tensors(str(path), "PyTorch", dict(_tensors_in(loaded, "")))


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path or "(the file)", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _tensors_in(inner, f"{path}.{index}" if path else str(index))
