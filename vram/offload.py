"""Another card's memory as the place that weights stream from, where it has room.

The segments are copies there. The weights themselves stay in host memory, where they are: mapped from a file they take no
RAM that the system cannot have back. When the model is detached the copies are given up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .units import MIB

log = logging.getLogger(__name__)

LEAVE_FREE = 512 * MIB  # of the card, for its driver and for whoever shows pictures on it


def _room_on(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + cached - LEAVE_FREE)


@dataclass(frozen=True)
class OffloadDevice:
    """Memory of ``device`` for segments. ``room_on(device)``: bytes that may be taken of it now."""

    device: torch.device
    room_on: Callable[[torch.device], int] = _room_on

    @property
    def room(self) -> int:
        return self.room_on(self.device)

    def empty(self, nbytes: int) -> torch.Tensor | None:
        """Memory of exactly ``nbytes``, uint8; None where the card has none after all."""
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def give_back(self) -> None:
        """Let the driver have what is free of torch's memory there. Never raises: the card may be lost."""
        if self.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:
                log.warning("memory of %s could not be given back: %s", self.device, error)

    def wait(self) -> None:
        """Until all that was written to the card is there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def find_offload_device(name: str | None, compute: torch.device) -> OffloadDevice | None:
    """The card called ``name`` ("cuda:1"); None for None and "cpu", which is RAM.

    Raises ValueError, which says what is wrong, where there is no such card or ``compute`` is it.
    """
    if name is None or name == "cpu":
        return None
    device = torch.device(name)
    count = torch.cuda.device_count() if compute.type == "cuda" else 0
    if compute.type != "cuda":
        raise ValueError(
            f"offload_device is {name}, but the model computes on {compute.type}; another card can hold weights only for a card"
        )
    if device.index >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count))
        raise ValueError(f"offload_device is {name}, but there is no such card here; there is {there}")
    if device == compute:
        raise ValueError(
            f"offload_device is {name}, the card that the model computes on; name another one, or leave it at cpu"
        )
    return OffloadDevice(device)
