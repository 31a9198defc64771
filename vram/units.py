"""Sizes in words: every size inside the pack is an integer in bytes, converted here, once, at the edge."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_bytes(size: int | float) -> str:
    """A size in bytes as a person reads it: ``703.1 MiB``, ``12.00 GiB``; negative sizes keep their sign."""
    magnitude = abs(size)
    if magnitude >= GIB - MIB / 20:
        return f"{size / GIB:.2f} GiB"
    if magnitude >= MIB - KIB / 20:
        return f"{size / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{size / KIB:.1f} KiB"
    return f"{size:.0f} B"
