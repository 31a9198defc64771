"""What a model file says of its weights, from its header alone: names, dtypes, shapes, bytes. No weight is read.

Formats: safetensors (https://huggingface.co/docs/safetensors) and GGUF
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A header is input of strangers: its length, the number of
its items and what it says of each weight are checked before anything is built from it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .inspect_weights import KINDS, Unreadable
from .layout import align
from .model_files import (
    AGAIN,
    MOST_DIMENSIONS,
    PICKLED,
    SAFETENSORS_DTYPES,
    check_offsets,
    is_impossible,
    read_header,
)
from .units import format_bytes

LONGEST_HEADER = 8 << 20  # of one file; that of a 14B model with a scale for each weight is below 1 MiB
MOST_WEIGHTS = 50_000  # in one file
MOST_ITEMS = 10 * MOST_WEIGHTS  # commas and brackets of a header in JSON, strings of one in GGUF
LONGEST_NAME = 512
DEEPEST_NAME = 32  # parts
# what reading a file may find wrong and loaders would stop at; gaps and odd addresses do not change a size
FATAL = ("cut_off", "malformed", "overlap")

GGUF_VERSIONS = (2, 3)
# bytes of each type of metadata but strings (8) and arrays (9)
GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY, GGUF_INT32, GGUF_UINT32 = 8, 9, 5, 4
# where converters of ComfyUI-GGUF keep a shape that GGUF cannot hold or that they changed
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
PLAIN_GGUF = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
}


class ModelUnreadable(Unreadable):
    """The model's files cannot be planned for; the message names the file, says why and what to do."""


class Weight(NamedTuple):
    """A weight as its file describes it: ``dtype`` is torch's name for it ("bfloat16") or GGUF's ("Q8_0"), ``shape`` its
    elements (of FP4, which no dtype of torch holds, the bytes that they are packed in), ``nbytes`` what it takes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_weights(path: Path) -> list[Weight]:
    """The weights of one safetensors or GGUF file, in the order in which they lie in it.

    Raises ModelUnreadable. Reads no more than LONGEST_HEADER bytes.
    """
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            raise Unreadable("it is a folder; name the files in it" if path.is_dir() else "there is no such file")
        if suffix == ".gguf":
            return read_gguf(path)
        if suffix in (".safetensors", ".sft"):
            return _read_safetensors(path)
    except OSError as error:
        raise ModelUnreadable(f"{path}: it could not be read: {error.strerror or error}") from None
    except Unreadable as error:
        raise ModelUnreadable(f"{path}: {error}") from None
    other = "the sizes in it are only known by loading it; convert it to safetensors" if suffix in PICKLED else None
    raise ModelUnreadable(f"{path}: {other or 'it is neither a .safetensors nor a .gguf file'}")


def _check_name(name: str) -> None:
    """Raises Unreadable for a name that no model's weight has."""
    if not name or len(name) > LONGEST_NAME or name.count(".") >= DEEPEST_NAME:
        raise Unreadable(f"a weight in it is called {name[:64]!r}..., {len(name)} characters. {AGAIN}")


# -- safetensors ---------------------------------------------------------------------------------------------------------


def check_json(encoded: bytes) -> None:
    """Raises Unreadable for JSON that would take long, or much memory, to parse."""
    items = sum(encoded.count(mark) for mark in (b",", b"[", b"{"))
    if items > MOST_ITEMS:
        raise Unreadable(f"its header has {items} items; one of {MOST_WEIGHTS} weights has fewer. {AGAIN}")


def _read_safetensors(path: Path) -> list[Weight]:
    stored, _, begin = read_header(path, LONGEST_HEADER, check_json)
    for tensor in stored:
        _check_name(tensor.name)
    for issue in check_offsets(stored, begin, path.stat().st_size):
        if issue.kind in FATAL:
            kind = KINDS[issue.kind]
            raise Unreadable(f"{kind.title}: {issue.path} {issue.problem}. {kind.advice}")
    stored.sort(key=lambda tensor: (tensor.start, tensor.end))
    return [Weight(t.name, SAFETENSORS_DTYPES[t.dtype][0], t.shape, t.end - t.start) for t in stored]


# -- GGUF ----------------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads a header of GGUF, little-endian, and stops where it grows beyond what a model needs."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.position = 0
        self.items = 0

    def bytes(self, count: int) -> bytes:
        self._advance(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self._advance(count)
        self.file.seek(count, 1)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        self.items += 1
        if self.items > MOST_ITEMS:
            raise Unreadable(f"its header has more than {MOST_ITEMS} names and texts. {AGAIN}")
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self.size:
            raise Unreadable(f"it ends inside its header, at {self.size} bytes. {AGAIN}")
        if self.position > LONGEST_HEADER:
            raise Unreadable(f"its header is longer than {format_bytes(LONGEST_HEADER)}. {AGAIN}")


def read_gguf(path: Path) -> list[Weight]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise Unreadable("reading GGUF needs the gguf package: pip install gguf") from None
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.bytes(4) != b"GGUF":
            raise Unreadable(f"it is no GGUF file. {AGAIN}")
        if (version := reader.number("I")) not in GGUF_VERSIONS:
            raise Unreadable(f"it is GGUF of version {version}; known are {', '.join(map(str, GGUF_VERSIONS))}")
        count, fields = reader.number("Q"), reader.number("Q")
        if count > MOST_WEIGHTS or fields > MOST_WEIGHTS:
            raise Unreadable(f"it claims to hold {count} weights and {fields} fields, more than any model's. {AGAIN}")
        metadata = {}
        for _ in range(fields):
            key = reader.text()
            metadata[key] = _gguf_value(reader, reader.number("I"))
        weights: dict[str, Weight] = {}
        spans: list[tuple[int, int, str]] = []
        for _ in range(count):
            name = reader.text()
            if (rank := reader.number("I")) > MOST_DIMENSIONS:
                raise Unreadable(
                    f"its weight {name[:LONGEST_NAME]} has {rank} dimensions, more than any model's. {AGAIN}"
                )
            shape = tuple(reader.number("Q") for _ in range(rank))[::-1]
            _check_name(name)
            if is_impossible(shape):
                raise Unreadable(f"its weight {name} has an impossible shape, {[*shape]}. {AGAIN}")
            if name in weights:
                raise Unreadable(f"the name {name} is twice in it. {AGAIN}")
            kind, start = reader.number("I"), reader.number("Q")
            try:
                stored = GGMLQuantizationType(kind)
                elements, nbytes = GGML_QUANT_SIZES[stored]
            except (ValueError, KeyError):
                raise Unreadable(
                    f"its weight {name} is of type {kind}, which the gguf package does not know: pip install -U gguf"
                ) from None
            if math.prod(shape) % elements:
                raise Unreadable(f"its weight {name}, {[*shape]}, is no whole number of blocks of {elements}. {AGAIN}")
            taken = math.prod(shape) // elements * nbytes
            original = metadata.get(ORIGINAL_SHAPE + name)
            if isinstance(original, tuple) and min(original, default=0) > 0 and math.prod(original) == math.prod(shape):
                shape = original
            weights[name] = Weight(name, PLAIN_GGUF.get(stored.name, stored.name), shape, taken)
            spans.append((start, start + taken, name))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise Unreadable(f"its general.alignment is {alignment!r}, no power of two. {AGAIN}")
    return [weights[name] for name in _checked_spans(spans, reader.size - align(reader.position, alignment))]


def _gguf_value(reader: _Reader, kind: int) -> Any:
    """A 32-bit integer, or a tuple of up to MOST_DIMENSIONS of them; None for other values, which are passed by."""
    if kind in (GGUF_INT32, GGUF_UINT32):
        return reader.number("i" if kind == GGUF_INT32 else "I")
    if kind in GGUF_SCALARS:
        reader.skip(GGUF_SCALARS[kind])
    elif kind == GGUF_STRING:
        reader.text()
    elif kind == GGUF_ARRAY:
        kind, length = reader.number("I"), reader.number("Q")
        if kind == GGUF_INT32 and length <= MOST_DIMENSIONS:
            return tuple(reader.number("i") for _ in range(length))
        if kind in GGUF_SCALARS:
            reader.skip(GGUF_SCALARS[kind] * length)
        elif kind == GGUF_STRING:
            for _ in range(length):
                reader.text()
        else:
            raise Unreadable(f"its metadata has an array of type {kind}, which no model needs. {AGAIN}")
    else:
        raise Unreadable(f"its metadata has a value of type {kind}, which GGUF does not know. {AGAIN}")
    return None


def _checked_spans(spans: list[tuple[int, int, str]], room: int) -> list[str]:
    """The names of weights that take bytes ``start`` to ``end`` of ``room`` bytes of data, in their order. Raises
    Unreadable when they do not fit, or overlap."""
    reached = 0
    spans.sort()
    for start, end, name in spans:
        if end > room:
            raise Unreadable(f"{KINDS['cut_off'].title}: {name} ends {end - room} bytes behind it. {AGAIN}")
        if start < reached and end > start:
            raise Unreadable(f"{KINDS['overlap'].title}: {name} begins {reached - start} bytes too early. {AGAIN}")
        reached = max(reached, end)
    return [name for _, _, name in spans]
