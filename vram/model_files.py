"""Model files, inspected without reading a weight: safetensors by its header, GGUF and what torch.save wrote by mapping.

Is the file whole, do its tensors fit what is said of them, where do they begin, and what do its FP8 layers need.
Format of safetensors: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from .units import format_bytes

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
MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 50
AGAIN = "Download or copy it again"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SAFE_PICKLES = (2, 6)  # torch.load(weights_only=True) before that could run code
FORMATS = (".safetensors", ".sft", ".gguf", *PICKLED)


# -- safetensors ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor as a safetensors header describes it; ``start`` and ``end`` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(
    path: Path, longest: int = MAX_HEADER, check: Callable[[bytes], None] | None = None
) -> tuple[list[Stored], dict[str, Any], int]:
    """The tensors, the metadata and the length (with its 8 bytes of size) of a safetensors header of up to ``longest`` bytes.
    ``check`` is called with its JSON before that is parsed. Raises Unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > MAX_HEADER:
            raise Unreadable(_not_safetensors(head + file.read(56)))
        if 8 + length > size:
            raise Unreadable(f"it ends inside its header, at {size} of {8 + length} bytes. {AGAIN}")
        if length > longest:
            raise Unreadable(
                f"its header is {format_bytes(length)} long; of a model's it would be at most {format_bytes(longest)}. {AGAIN}"
            )
        encoded = file.read(length)
    if check is not None:
        check(encoded)
    return parse_header(encoded)


def parse_header(encoded: bytes) -> tuple[list[Stored], dict[str, Any], int]:
    """The same of the JSON of a header. Raises Unreadable."""
    begin = 8 + len(encoded)
    try:
        header = json.loads(encoded, object_pairs_hook=_names_once)
        metadata = header.pop("__metadata__", None) or {}
        tensors = [_stored(name, entry, begin) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"its header is not one of safetensors ({error!r}). {AGAIN}") from None
    return tensors, metadata, begin


def _names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError when a name is twice in it: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name:.64} is twice in it")
    return found


def _stored(name: str, entry: dict[str, Any], begin: int) -> Stored:
    """The tensor of an entry, of data that starts at ``begin``. Raises ValueError, TypeError or KeyError for what is none."""
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    for number in (*shape, start, end):
        if type(number) is not int or abs(number) >> 63:
            raise ValueError(f"{number!r:.32} is no whole number of 64 bits")
    return Stored(name, str(entry["dtype"]), tuple(shape), begin + start, begin + end)


def _not_safetensors(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the model. Download the file itself (git lfs pull)"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, not the model. Download it again, signed in if its source asks for that"
    return "it is not a safetensors file: its first 8 bytes give no possible size of a header"


def is_impossible(shape: Sequence[int]) -> bool:
    """Whether no tensor of a model can have such a shape."""
    if len(shape) > MOST_DIMENSIONS or min(shape, default=0) < 0:
        return True
    return math.prod([size for size in shape if size]) > MOST_ELEMENTS


def check_offsets(tensors: list[Stored], begin: int, size: int) -> Iterator[Issue]:
    """Whether the tensors of a safetensors file of ``size`` bytes, whose data starts at ``begin``, fill it exactly, fit
    their shapes."""
    reached = begin
    for tensor in sorted(tensors, key=lambda stored: (stored.start, stored.end)):
        name, bits = SAFETENSORS_DTYPES.get(tensor.dtype, (None, 8))
        found = tensor.end - tensor.start
        if name is None:
            yield Issue(tensor.name, f"its dtype {tensor.dtype:.32} is none of safetensors'", "malformed")
        elif is_impossible(tensor.shape):
            dimensions = [*tensor.shape[:MOST_DIMENSIONS]]
            yield Issue(
                tensor.name, f"{len(tensor.shape)} dimensions of {dimensions} are an impossible shape", "malformed"
            )
        elif found != (wanted := math.prod(tensor.shape) * bits // 8) or tensor.start < begin:
            problem = f"{tensor.dtype} of shape {list(tensor.shape)} needs {wanted} bytes, it has {found}"
            yield Issue(tensor.name, problem, "malformed")
        if tensor.end > size:
            yield Issue(tensor.name, f"needs bytes {tensor.start} to {tensor.end} of a file of {size}", "cut_off")
        if tensor.start > reached:
            yield Issue(tensor.name, f"{tensor.start - reached} unused bytes before it", "gap")
        elif tensor.start < reached and found > 0:
            yield Issue(tensor.name, f"begins {reached - tensor.start} bytes before the end of another", "overlap")
        reached = max(reached, tensor.end)
    if size > reached:
        yield Issue("(end of the file)", f"{size - reached} bytes after the last tensor", "gap")


def check_alignment(tensors: list[Stored]) -> Iterator[Issue]:
    """Where the tensors of a safetensors file begin."""
    for tensor in tensors:
        element = max(1, SAFETENSORS_DTYPES.get(tensor.dtype, (None, 8))[1] // 8)
        if tensor.end > tensor.start and tensor.start % element:
            problem = f"begins at byte {tensor.start}, which is no multiple of the {element} bytes of its elements"
            yield Issue(tensor.name, problem, "split_elements")
        elif tensor.end > tensor.start and tensor.start % ALIGNMENT:
            problem = f"begins {tensor.start % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
            yield Issue(tensor.name, problem, "mapped_misaligned")


def _inspect_safetensors(path: Path) -> Report:
    from .model_headers import LONGEST_HEADER, check_json

    tensors, metadata, begin = read_header(path, LONGEST_HEADER, check_json)
    facts = {t.name: Facts(SAFETENSORS_DTYPES.get(t.dtype, (t.dtype,))[0], t.shape) for t in tensors}
    fp8 = fp8_weights(facts)
    issues = (
        *check_offsets(tensors, begin, path.stat().st_size),
        *check_alignment(tensors),
        *check_fp8(fp8, promised_scales(facts, metadata)),
    )
    nbytes = sum(max(0, tensor.end - tensor.start) for tensor in tensors)
    return Report(str(path), "safetensors", len(tensors), nbytes, issues, tuple(fp8))


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
    from .model_headers import read_gguf  # which needs this module

    read_gguf(path)  # bounded, where the package would follow a length that the file claims
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise Unreadable(f"it is no GGUF file, or cut off ({error}). {AGAIN}") from None
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
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_PICKLES:
        raise Unreadable(
            f"PyTorch {torch.__version__} can be made to run code by such a file (CVE-2025-32434): update to 2.6 or newer"
        )
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
