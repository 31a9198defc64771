"""What a user may ask of the engine, checked before anything is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .plan import MODES
from .units import GIB, MIB

LOSSLESS = ("auto", "on", "off")
LARGEST = 1 << 20  # GiB or MiB that a user may ask for
DEFAULT_BLOCK_SIZE = 300 * MIB


@dataclass(frozen=True)
class SwapConfig:
    """Settings of block swap. Sizes in bytes.

    max_vram: what this process may use of the device in all while the model runs; None: as much as is sensible here.
    block_size: units are runs of layers up to this size (chunkwise, adaptive).
    mode: "adaptive", "chunkwise" or "layerwise".
    empty_cache_every: empty the allocator's cache after every so many forwards; 0 never.
    streamed_blocks: stream exactly so many blocks, spread evenly, the others resident, instead of planning by max_vram.
    slots: number of slots instead of the planned one.
    host_budget: RAM that may be page-locked; None: what leaves the system 4 GiB or 10%, whichever is more.
    offload_device: where streamed weights wait: None or "cpu", RAM; "cuda:1", that card's memory as far as it has room, with the
        rest in RAM. It must not be the card that computes.
    block_names: names or paths of the module lists that hold blocks; None: those that are known.
    lossless: whether weights are kept encoded in RAM and on the link. "auto": once forwards are seen to wait for copies and would
        be shorter, or at once where plain weights do not fit the RAM, "on", "off".
    """

    max_vram: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    mode: str = "adaptive"
    empty_cache_every: int = 0
    streamed_blocks: int | None = None
    slots: int | None = None
    host_budget: int | None = None
    block_names: tuple[str, ...] | None = None
    offload_device: str | None = None
    lossless: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"swap_mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.lossless not in LOSSLESS:
            raise ValueError(f"lossless is {self.lossless!r}; it must be one of {', '.join(LOSSLESS)}")
        _check("max_vram", self.max_vram, 1, 1 << 50)
        if self.block_size is None:
            raise ValueError("block_size is None; it must be a whole number")
        _check("block_size", self.block_size, 1, 1 << 50)
        if self.empty_cache_every is None:
            raise ValueError("empty_cache_freq is None; it must be a whole number")
        _check("empty_cache_freq", self.empty_cache_every, 0, 1 << 31)
        _check("streamed_blocks", self.streamed_blocks, 0, 1 << 20)
        _check("slots", self.slots, 2, 64)
        _check("host_budget", self.host_budget, 0, 1 << 50)
        names = self.block_names
        if names is not None and not (isinstance(names, tuple) and names and all(isinstance(n, str) for n in names)):
            raise ValueError(f"block_names is {names!r}; it must be a tuple of names or None")
        away = self.offload_device
        if away is not None and not (isinstance(away, str) and re.fullmatch(r"cpu|cuda:\d{1,2}", away, re.ASCII)):
            raise ValueError(f"offload_device is {away!r}; it must be 'cpu' (RAM) or another card, such as 'cuda:1'")

    @classmethod
    def from_user(
        cls, max_vram_gb: float, block_size_mb: float, swap_mode: str, empty_cache_freq: int, **others: object
    ) -> SwapConfig:
        """From the numbers of a node or a command line: GiB, MiB; ``max_vram_gb`` 0 is automatic.

        Raises ValueError that names the parameter and what is wrong with it.
        """
        for name, value in (("max_vram_gb", max_vram_gb), ("block_size_mb", block_size_mb)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"{name} is {value!r}; it must be a number")
            if abs(value) > LARGEST:
                raise ValueError(f"{name} is far too large; the largest is {LARGEST}")
            if value < 0:
                raise ValueError(f"{name} is {value}; it cannot be negative")
        if block_size_mb == 0:
            raise ValueError("block_size_mb is 0; a unit must hold at least something, 300 is a good size")
        return cls(
            max_vram=round(max_vram_gb * GIB) if max_vram_gb else None,
            block_size=max(1, round(block_size_mb * MIB)),
            mode=swap_mode,
            empty_cache_every=empty_cache_freq,
            **others,
        )


def _check(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
