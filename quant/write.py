"""A safetensors file written tensor by tensor: its header first, for all sizes are known, then the data in any order.

The file appears under its name only when it is whole. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..vram.model_files import SAFETENSORS_DTYPES
from ..vram.units import format_bytes

# Data begins at a multiple, and so does every tensor whose size is one: matrix products of weights that are used in place, at
# other addresses, differ in the last bit.
ALIGNMENT = 64
CODES = {name: (code, bits // 8) for code, (name, bits) in SAFETENSORS_DTYPES.items() if bits >= 8}

Shaped = tuple[str, tuple[int, ...]]  # torch's name of a dtype, and a shape
Put = Callable[[str, torch.Tensor], None]


class CannotWrite(OSError):
    """The file cannot be written where it was asked for; the message says why."""


def nbytes_of(tensor: Shaped) -> int:
    """Bytes of a tensor of such a dtype and shape."""
    dtype, shape = tensor
    return CODES[dtype][1] * math.prod(shape)


def arrange(
    tensors: Mapping[str, Shaped], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The header (with its length before it), where each tensor begins and ends in the file, and the size of the file.

    Tensors whose size is a multiple of ALIGNMENT come first, then larger dtypes before smaller ones: none begins at an
    address that its elements do not like.
    """
    sizes = {name: nbytes_of(tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (sizes[name] % ALIGNMENT != 0, -CODES[tensors[name][0]][1]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + sizes[name]
        places[name] = (start, end)
        header[name] = {"dtype": CODES[dtype][0], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    begin = 8 + len(encoded)
    places = {name: (begin + start, begin + end) for name, (start, end) in places.items()}
    return len(encoded).to_bytes(8, "little") + encoded, places, begin + end


def check_writable(path: Path, overwrite: bool) -> None:
    """Raises CannotWrite for a name or a folder where no file can be put, and FileExistsError for a file that is there."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise CannotWrite(f"{path}: what is written is safetensors; let its name end in .safetensors")
    if path.is_dir() or not path.parent.is_dir():
        problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise CannotWrite(f"{path}: {problem}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: it exists already; ask for overwriting, or choose another name")


@contextlib.contextmanager
def writing(
    path: Path, tensors: Mapping[str, Shaped], metadata: Mapping[str, str], *, overwrite: bool = False
) -> Iterator[Put]:
    """Gives ``put(name, tensor)``, which any thread may call with a CPU tensor of what ``tensors`` says, in any order.

    The data goes to ``<path>.part`` and is moved to ``path`` at the end; after an error nothing is left. What a killed run left
    there is replaced.

    Raises FileExistsError, CannotWrite (also when the disk has too little room, before anything is written), and at the end
    ValueError when a tensor is missing.
    """
    check_writable(path, overwrite)
    header, places, size = arrange(tensors, metadata)
    missing, lock = set(tensors), threading.Lock()
    with whole_file(path, size, overwrite=overwrite) as part:

        def put(name: str, tensor: torch.Tensor) -> None:
            start, end = places[name]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            if len(data) != end - start:
                raise ValueError(f"{name} has {len(data)} bytes, of which the header says {end - start}")
            write_at(part, path, start, memoryview(data))
            with lock:
                missing.discard(name)

        write_at(part, path, 0, memoryview(header))
        yield put
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written, {min(missing)} first")


@contextlib.contextmanager
def whole_file(path: Path, size: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives the name of a file of ``size`` bytes, ``<path>.part``, that becomes ``path`` at the end; after an error nothing is
    left. What a killed run left there is replaced. Raises FileExistsError and CannotWrite."""
    check_writable(path, overwrite)
    part = path.with_name(f"{path.name}.part")
    try:
        with _telling(path):
            part.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
        if free < size:
            raise CannotWrite(
                f"{path}: it takes {format_bytes(size)} and the disk has {format_bytes(free)} free; "
                f"make {format_bytes(size - free)} of room, or name another folder"
            )
        with _telling(path), part.open("wb") as file:
            file.truncate(size)
        yield part
        with _telling(path), part.open("r+b") as file:
            os.fsync(file.fileno())
        check_writable(path, overwrite)
        with _telling(path):
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_at(part: Path, path: Path, start: int, data: memoryview) -> None:
    """Write ``data`` at byte ``start`` of ``part``, which is to become ``path``. Raises CannotWrite."""
    with _telling(path):
        _write(part, start, data)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """An error of the system, in words."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path}: it could not be written: {error.strerror or error}") from error


def _write(path: Path, start: int, data: memoryview) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        while data:
            data = data[file.write(data) :]
