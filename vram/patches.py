"""Changes to weights that are made when they are packed (LoRA), and who is told how far that is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .layout import leaves

Progress = Callable[[int, int], None]  # bytes done, and bytes in all


@dataclass(frozen=True)
class Patches:
    """Changes to weights that are made when they are packed (LoRA).

    ``signature(path)`` is None for a weight that is not patched, else a value that changes when its patch does.
    ``apply(path, tensor)`` returns the patched weight, on any device, in the dtype and shape of ``tensor``, which it
    leaves alone.
    """

    signature: Callable[[str], Hashable | None]
    apply: Callable[[str, torch.Tensor], torch.Tensor]


NO_PATCHES = Patches(lambda path: None, lambda path, tensor: tensor)


def patched(path: str, tensor: torch.Tensor, patches: Patches) -> torch.Tensor:
    """The patched weight. Raises ValueError when its shape or dtype, or that of a part, is not the original's."""
    result = patches.apply(path, tensor)
    for part, like in zip(leaves(result), leaves(tensor), strict=True):
        if part.shape != like.shape or part.dtype != like.dtype:
            raise ValueError(
                f"the patched weight {path} is {tuple(part.shape)} {part.dtype}, not {tuple(like.shape)} {like.dtype}"
            )
    return result
