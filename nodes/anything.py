"""A socket that every type connects to, and what the nodes that have one share."""

from __future__ import annotations

from typing import Any


class Anything(str):
    """ "*" as the host writes it, and equal to every other type where the host compares: ComfyUI 0.3.64 refuses a plain "*"
    as the type of an output."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


ANYTHING = Anything("*")


def anything_input(tooltip: str) -> tuple[Anything, dict[str, Any]]:
    """The declaration of an input that takes any type."""
    return ANYTHING, {"tooltip": tooltip}
