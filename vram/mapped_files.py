"""Files that weights are mapped from, and whether one was cut off since.

Loaders map a model's file instead of reading it (safetensors through ``torch.UntypedStorage.from_file``). They refuse a file
that is shorter than its header says. But when a file is overwritten or cut off while a model is mapped from it, touching the
missing part ends the whole process (SIGBUS on Linux; Windows does not allow it). So the length is looked at before
weights are read. A file that was deleted, or replaced by another of its name, stays readable as it was.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .units import format_bytes

MAPS = Path("/proc/self/maps")


class FileCutOff(OSError):
    """A model's file is shorter than when the model was loaded from it."""


@dataclass(frozen=True)
class MappedFile:
    """A file of which bytes up to ``end`` are needed. ``inode``: a replaced file has another. (Devices are not compared:
    an overlay file system shows one number here and another in the list of mappings.)"""

    path: str
    inode: int
    end: int

    def check(self) -> None:
        """Raises FileCutOff if the file is shorter than what is mapped of it."""
        try:
            found = os.stat(self.path)
        except OSError:
            return  # deleted or moved away: what is mapped stays
        if found.st_ino == self.inode and found.st_size < self.end:
            raise FileCutOff(
                f"{self.path} was cut off: it has {format_bytes(found.st_size)}, but weights up to "
                f"{format_bytes(self.end)} are read from it. It was written to after the model was loaded; put the whole "
                "file back and load the model again"
            )


def files_behind(tensors: Iterable[torch.Tensor]) -> list[MappedFile]:
    """The files that ``tensors`` in host memory are mapped from, each with the last byte that they need. Linux only: elsewhere,
    and for ordinary memory, none."""
    mappings = _mappings()
    if not mappings:
        return []
    starts = [start for start, *_ in mappings]
    ends: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        address = tensor.data_ptr()
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= mappings[index][1]:
            continue
        start, _, offset, inode, path = mappings[index]
        end = offset + address - start + tensor.numel() * tensor.element_size()
        ends[path, inode] = max(ends.get((path, inode), 0), end)
    return [MappedFile(path, inode, end) for (path, inode), end in ends.items()]


def _mappings() -> list[tuple[int, int, int, int, str]]:
    """(start, end, offset in the file, inode, path) of each file mapped in this process, by address. The format of
    the lines: proc_pid_maps(5)."""
    found = []
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] != "0" and fields[5].startswith("/"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            found.append((start, end, int(fields[2], 16), int(fields[4]), fields[5]))
    return sorted(found)
