"""Cards that are not in this machine: what their makers state, and which part of it a diffusion model gets.

Sources. Memory, memory bandwidth and dense 16-bit tensor throughput with FP32 accumulation are NVIDIA's: the appendices
of the architecture white papers (Turing; Ampere GA102; Ada, version 2.1; RTX Blackwell) for GeForce and RTX cards, the
data sheets of A10, A30, A40, A100, H100, H200, H20, L4, L40, L40S, B200, T4 and V100 for the others. Where a sheet
gives only the figure with sparsity, half of it stands here. GeForce cards multiply FP16 and BF16 with FP32 accumulation
at half the rate of the FP16 accumulation that is often quoted (Ada white paper, appendix A); PyTorch accumulates in
FP32. FP8 is stated at twice the 16-bit rate on every card that has it (compute capability 8.9 and later).

What of it is reached is an assumption, and the reason why a card that is here is measured instead. The shares in
``FAMILIES`` come from published runs of PyTorch: large products reach the stated rate or more on GeForce cards, whose
clocks exceed the stated ones (RTX 3090 76 of 71, 4090 160 to 173 of 165, 5090 224 to 236 of 209.5 TFLOP/s), and about
0.8 of it on data centre cards, which run into their power limit (A100 246 to 266 of 312, H100 789 of 989);
FlashAttention 2 reaches 0.37 (H100, head width 128) to 0.7 (A100) there and most of the product rate on GeForce cards.
On an H200 twelve blocks of Wan 14B with 32,760 tokens took 0.90 s (benchmarks/README.md): 0.56 of the stated rate for
both together.

The reference implementation's choice by name (copy streams, bandwidth target) is ``tuning_for``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from .units import GIB

PCIE_LANE = {3: 0.78e9, 4: 1.6e9, 5: 3.4e9}
"""Page-locked bytes a second and lane: 12.5, 25.6 and 54.4 GB/s with 16 lanes, about 0.8 to 0.87 of what the standard
states (0.985, 1.969, 3.938 GB/s a lane). 55.3 was measured on PCIe 5 x16."""
VISIBLE_VRAM = 0.98
"""The part of the memory on the box that a program sees; error correction and the driver take the rest."""
FP8_GAIN = 1.7
"""FP8 products over 16-bit ones as reached, of the 2 that is stated."""
MEMORY_SHARE = 0.85
"""Of the stated memory bandwidth, in an elementwise pass."""


@dataclass(frozen=True)
class Family:
    """What cards of one architecture and market have in common. ``matmul`` and ``attention`` are the assumed shares of
    the stated 16-bit throughput that linear layers and attention (head width 128) of a diffusion transformer reach."""

    capability: tuple[int, int]
    matmul: float
    attention: float


FAMILIES = {
    "Volta": Family((7, 0), 0.7, 0.35),
    "Turing GeForce": Family((7, 5), 0.8, 0.35),
    "Turing data centre": Family((7, 5), 0.5, 0.25),
    "Ampere GeForce": Family((8, 6), 0.95, 0.85),
    "Ampere RTX": Family((8, 6), 0.7, 0.5),
    "Ampere data centre": Family((8, 0), 0.8, 0.65),
    "Ada GeForce": Family((8, 9), 0.95, 0.85),
    "Ada RTX": Family((8, 9), 0.7, 0.5),
    "Hopper": Family((9, 0), 0.7, 0.5),
    "Blackwell GeForce": Family((12, 0), 0.95, 0.85),
    "Blackwell RTX": Family((12, 0), 0.7, 0.5),
    "Blackwell data centre": Family((10, 0), 0.7, 0.5),
}


@dataclass(frozen=True)
class Card:
    """A card as its maker states it. ``vram`` in bytes, ``flops`` dense 16-bit FLOP/s with FP32 accumulation,
    ``bandwidth`` of its memory in bytes/s, ``pcie`` (generation, lanes)."""

    name: str
    vram: int
    flops: float
    bandwidth: float
    pcie: tuple[int, int]
    family: str

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability."""
        return FAMILIES[self.family].capability

    @property
    def link(self) -> float:
        """Page-locked bytes/s each way, in a slot of the card's own generation and lanes."""
        generation, lanes = self.pcie
        return PCIE_LANE[generation] * lanes

    @property
    def matmul(self) -> float:
        """FLOP/s that 16-bit linear layers are assumed to reach."""
        return self.flops * FAMILIES[self.family].matmul

    @property
    def matmul_fp8(self) -> float | None:
        """FLOP/s that FP8 linear layers are assumed to reach; None before compute capability 8.9."""
        return self.matmul * FP8_GAIN if self.capability >= (8, 9) else None

    @property
    def attention(self) -> float:
        """FLOP/s that attention is assumed to reach."""
        return self.flops * FAMILIES[self.family].attention

    @property
    def memory(self) -> float:
        """Bytes/s that an elementwise pass over device memory is assumed to reach."""
        return self.bandwidth * MEMORY_SHARE


def _card(name: str, gib: float, tflops: float, gigabytes: float, pcie: str, family: str) -> Card:
    generation, lanes = pcie.split("x")
    return Card(
        name, int(gib * GIB * VISIBLE_VRAM), tflops * 1e12, gigabytes * 1e9, (int(generation), int(lanes)), family
    )


CARDS = (
    _card("RTX 2060", 6, 25.8, 336, "3x16", "Turing GeForce"),
    _card("RTX 2070", 8, 29.9, 448, "3x16", "Turing GeForce"),
    _card("RTX 2080", 8, 40.3, 448, "3x16", "Turing GeForce"),
    _card("RTX 2080 Ti", 11, 53.8, 616, "3x16", "Turing GeForce"),
    _card("RTX 3050", 8, 18.2, 224, "4x8", "Ampere GeForce"),
    _card("RTX 3060 12GB", 12, 25.5, 360, "4x16", "Ampere GeForce"),
    _card("RTX 3060 Ti", 8, 32.4, 448, "4x16", "Ampere GeForce"),
    _card("RTX 3070", 8, 40.6, 448, "4x16", "Ampere GeForce"),
    _card("RTX 3070 Ti", 8, 43.5, 608, "4x16", "Ampere GeForce"),
    _card("RTX 3080 10GB", 10, 59.5, 760, "4x16", "Ampere GeForce"),
    _card("RTX 3080 12GB", 12, 61.3, 912, "4x16", "Ampere GeForce"),
    _card("RTX 3080 Ti", 12, 68.2, 912, "4x16", "Ampere GeForce"),
    _card("RTX 3090", 24, 71.0, 936, "4x16", "Ampere GeForce"),
    _card("RTX 3090 Ti", 24, 80.0, 1008, "4x16", "Ampere GeForce"),
    _card("RTX 4060", 8, 30.2, 272, "4x8", "Ada GeForce"),
    _card("RTX 4060 Ti 8GB", 8, 44.1, 288, "4x8", "Ada GeForce"),
    _card("RTX 4060 Ti 16GB", 16, 44.1, 288, "4x8", "Ada GeForce"),
    _card("RTX 4070", 12, 58.3, 504, "4x16", "Ada GeForce"),
    _card("RTX 4070 Super", 12, 71.0, 504, "4x16", "Ada GeForce"),
    _card("RTX 4070 Ti", 12, 80.2, 504, "4x16", "Ada GeForce"),
    _card("RTX 4070 Ti Super", 16, 88.2, 672, "4x16", "Ada GeForce"),
    _card("RTX 4080", 16, 97.5, 717, "4x16", "Ada GeForce"),
    _card("RTX 4080 Super", 16, 104.4, 736, "4x16", "Ada GeForce"),
    _card("RTX 4090", 24, 165.2, 1008, "4x16", "Ada GeForce"),
    _card("RTX 4090 D", 24, 147.1, 1008, "4x16", "Ada GeForce"),
    _card("RTX 5060", 8, 38.4, 448, "5x8", "Blackwell GeForce"),
    _card("RTX 5060 Ti 8GB", 8, 47.4, 448, "5x8", "Blackwell GeForce"),
    _card("RTX 5060 Ti 16GB", 16, 47.4, 448, "5x8", "Blackwell GeForce"),
    _card("RTX 5070", 12, 61.7, 672, "5x16", "Blackwell GeForce"),
    _card("RTX 5070 Ti", 16, 87.9, 896, "5x16", "Blackwell GeForce"),
    _card("RTX 5080", 16, 112.6, 960, "5x16", "Blackwell GeForce"),
    _card("RTX 5090", 32, 209.5, 1792, "5x16", "Blackwell GeForce"),
    _card("RTX A4000", 16, 76.7, 448, "4x16", "Ampere RTX"),
    _card("RTX A5000", 24, 111.1, 768, "4x16", "Ampere RTX"),
    _card("RTX A6000", 48, 154.8, 768, "4x16", "Ampere RTX"),
    _card("RTX 4000 Ada", 20, 106.9, 360, "4x16", "Ada RTX"),
    _card("RTX 5000 Ada", 32, 261.1, 576, "4x16", "Ada RTX"),
    _card("RTX 6000 Ada", 48, 364.2, 960, "4x16", "Ada RTX"),
    _card("RTX PRO 6000 Blackwell", 96, 503.8, 1792, "5x16", "Blackwell RTX"),
    _card("T4", 15, 65.0, 320, "3x16", "Turing data centre"),
    _card("V100 16GB", 16, 125.0, 900, "3x16", "Volta"),
    _card("V100 32GB", 32, 125.0, 900, "3x16", "Volta"),
    _card("A10", 24, 125.0, 600, "4x16", "Ampere RTX"),
    _card("A10G", 24, 70.0, 600, "4x16", "Ampere RTX"),
    _card("A40", 48, 149.7, 696, "4x16", "Ampere RTX"),
    _card("L4", 24, 121.0, 300, "4x16", "Ada RTX"),
    _card("L40", 48, 181.0, 864, "4x16", "Ada RTX"),
    _card("L40S", 48, 362.0, 864, "4x16", "Ada RTX"),
    _card("A30", 24, 165.0, 933, "4x16", "Ampere data centre"),
    _card("A100 40GB", 40, 312.0, 1555, "4x16", "Ampere data centre"),
    _card("A100 80GB", 80, 312.0, 2039, "4x16", "Ampere data centre"),
    _card("A100 PCIe 40GB", 40, 312.0, 1555, "4x16", "Ampere data centre"),
    _card("A100 PCIe 80GB", 80, 312.0, 1935, "4x16", "Ampere data centre"),
    _card("H100", 80, 989.4, 3350, "5x16", "Hopper"),
    _card("H100 PCIe", 80, 756.5, 2039, "5x16", "Hopper"),
    _card("H100 NVL", 94, 835.5, 3938, "5x16", "Hopper"),
    _card("H20", 96, 148.0, 4000, "5x16", "Hopper"),
    _card("H200", 141, 989.4, 4800, "5x16", "Hopper"),
    _card("H200 NVL", 141, 835.5, 4800, "5x16", "Hopper"),
    _card("B200", 180, 2250.0, 7700, "5x16", "Blackwell data centre"),
)

_SAYS_NOTHING = {
    "nvidia",
    "geforce",
    "rtx",
    "quadro",
    "tesla",
    "graphics",
    "gpu",
    "card",
    "tensor",
    "core",
    "generation",
    "blackwell",
    "workstation",
    "server",
    "edition",
    "max",
    "q",
    "founders",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
    "sxm",
    "sxm2",
    "sxm4",
    "sxm5",
}
_SIZE = re.compile(r"\b([1-9]\d{0,3}(?:\.\d+)?)\s*(?:gib|gb|g)\b")
_SLICE = re.compile(r"\bmig\s+([1-7])g\.([1-9]\d{0,3})gb\b.*")


def _words(text: str) -> list[str]:
    """What tells a card from others in its name: "NVIDIA GeForce RTX 4060Ti 16GB" is 4060, ti."""
    text = re.sub(r"\brtx(?=\w)", "rtx ", _SIZE.sub(" ", text.lower()))
    text = re.sub(r"(?<=\d{4})(ti|super|d)\b", r" \1", text)
    return [word for word in re.findall(r"[a-z0-9]+", text) if word not in _SAYS_NOTHING]


def find(text: str, vram: int | None = None) -> Card:
    """The card that ``text`` names, as a person or a driver writes it: "4090", "RTX 4060 Ti 16GB", "NVIDIA
    A100-SXM4-80GB MIG 3g.40gb" (a slice has its part of the units and of the memory).

    A size in ``text`` chooses between versions, and stands if no version has it. Without one ``vram`` chooses (bytes,
    as a driver tells), and without that the smallest version is taken. Raises ValueError with similar names where
    nothing fits. Laptop cards are not listed: their speed is the power limit that their maker chose.
    """
    name = text.lower()
    part = _SLICE.search(name)
    name = _SLICE.sub("", name)
    versions = [card for card in CARDS if set(_words(card.name)) == set(_words(name))]
    if not versions:
        raise ValueError(_unknown(text))
    size = _SIZE.search(name)
    wanted = int(float(size[1]) * GIB * VISIBLE_VRAM) if size else None if part else vram
    card = min(versions, key=lambda version: version.vram if wanted is None else abs(version.vram - wanted))
    if size and abs(card.vram - wanted) > wanted // 10:
        plain = re.sub(r" \d+GB$", "", card.name)
        card = replace(card, name=f"{plain} {size[1]}GB", vram=wanted)
    return card if part is None else _slice(card, int(part[1]), int(part[2]))


def _slice(card: Card, units: int, gib: int) -> Card:
    """A MIG slice of ``units`` of seven compute units and ``gib`` of memory; the link is shared with other slices."""
    return replace(
        card,
        name=f"{card.name} MIG {units}g.{gib}gb",
        vram=int(gib * GIB * VISIBLE_VRAM),
        flops=card.flops * units / 7,
        bandwidth=card.bandwidth * min(1.0, gib * GIB * VISIBLE_VRAM / card.vram),
    )


def _unknown(text: str) -> str:
    """Why ``find`` found nothing, with the listed cards whose names are like it."""
    if "laptop" in text.lower() or "mobile" in text.lower():
        return (
            f"'{text}' is not in the table: the speed of laptop cards is the power limit that their maker chose. "
            "Measure on that machine, or give bandwidth and throughput as numbers"
        )
    plain = {" ".join(_words(card.name)): re.sub(r" \d+GB$", "", card.name) for card in CARDS}
    like = [plain[name] for name in difflib.get_close_matches(" ".join(_words(text)), plain, n=4, cutoff=0.6)]
    known = (
        f"Did you mean {' or '.join(like)}?" if like else "It knows NVIDIA cards from RTX 2060 to RTX 5090 and B200."
    )
    return f"'{text}' is not in the table of cards. {known} Or give bandwidth and throughput as numbers"


def tuning_for(name: str) -> tuple[int, float]:
    """(copy streams, bandwidth target as a share of the link) that the reference implementation chooses by a card's
    name: 16 and 0.9 for RTX 5090 and 4090, 12 and 0.8 for RTX 3090, else 8 and 0.7. A fallback where nothing is
    measured."""
    if "5090" in name or "4090" in name:
        return 16, 0.9
    return (12, 0.8) if "3090" in name else (8, 0.7)
