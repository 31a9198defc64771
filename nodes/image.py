"""A drawn picture as what ComfyUI calls an IMAGE."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image


def image_of(picture: Image.Image) -> torch.Tensor:
    """``picture`` as an IMAGE: float32 of shape [1, height, width, 3], from 0 to 1."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(picture.convert("RGB"), dtype=numpy.float32) / 255)[None]
