"""Which weights of a model are quantized, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ..vram.model_facts import FLOATS, ModelFacts
from .formats import Format

# Names of layers inside blocks that stay as they are: embeddings, modulation, norms, and parts that refine a prompt once. The
# first and last layers of a model (its embedders and its head) lie outside its blocks and stay anyway.
DEFAULT_KEEP = (
    r"norm|embed|modulation|_mod(\.|$)|(^|\.)ada_?ln|distilled_guidance_layer|refiner|scale_shift|gate_logits"
)

NO_MATRIX = "it is no weight of a linear layer"
NO_FLOAT = "it is not stored as a float"
OUTSIDE = "it lies outside the blocks"
MATCHED = "the pattern of what to keep names it"
AT_THE_ENDS = "it is in a first or last block"
TABLE = "it is a table, not a linear layer"

_TABLE = re.compile(r"(embedding|embeddings|embed_tokens|pos_embed|emb)$")


@dataclass(frozen=True)
class Choice:
    """``quantized``: names of weights, in the files' order. ``kept``: those of all others, each with the reason in words."""

    quantized: tuple[str, ...]
    kept: dict[str, str] = field(repr=False)


def choose(facts: ModelFacts, format: Format, keep: str | None = DEFAULT_KEEP, first_last: int = 0) -> Choice:
    """Quantize the linear layers inside the blocks.

    keep: pattern of names of layers (``blocks.0.ffn.2``) that stay, searched anywhere in them without regard to case; None or
    empty: none. first_last: how many blocks stay at either end of each list of blocks.

    Raises ValueError for a pattern that is none.
    """
    pattern = _compiled(keep)
    blocks = set(facts.blocks)
    ends = {
        f"{path}.{number}"
        for path, count in facts.block_lists.items()
        for number in range(count)
        if not first_last <= number < count - first_last
    }

    def reason(name: str, dtype: str, shape: tuple[int, ...]) -> str | None:
        layer = name.removesuffix(".weight")
        if layer == name or len(shape) != 2:
            return NO_MATRIX
        if dtype not in FLOATS:
            return NO_FLOAT
        block = _block_of(layer, blocks)
        if block is None:
            return OUTSIDE
        if pattern is not None and pattern.search(layer):
            return MATCHED
        return AT_THE_ENDS if block in ends else format.refuses(shape)

    return _sorted_by(facts, reason)


def choose_all(facts: ModelFacts) -> Choice:
    """Quantize every linear layer: hosts that read the older layout run all of them in FP8, scaled or not. Tables of
    embeddings, which those hosts leave alone, are known by their names."""

    def reason(name: str, dtype: str, shape: tuple[int, ...]) -> str | None:
        layer = name.removesuffix(".weight")
        if layer == name or len(shape) != 2:
            return NO_MATRIX
        if dtype not in FLOATS:
            return NO_FLOAT
        return TABLE if _TABLE.search(layer) else None

    return _sorted_by(facts, reason)


def _sorted_by(facts: ModelFacts, reason: Callable[[str, str, tuple[int, ...]], str | None]) -> Choice:
    reasons = {weight.name: reason(weight.name, weight.dtype, weight.shape) for weight in facts.weights}
    return Choice(
        tuple(name for name, why in reasons.items() if why is None),
        {name: why for name, why in reasons.items() if why is not None},
    )


def _compiled(keep: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(keep, re.IGNORECASE) if keep else None
    except re.error as error:
        raise ValueError(f"the pattern of what to keep, {keep!r}, is no regular expression: {error}") from None


def _block_of(layer: str, blocks: set[str]) -> str | None:
    """The block that a layer is in, or is."""
    parts = layer.split(".")
    return next((path for end in range(2, len(parts) + 1) if (path := ".".join(parts[:end])) in blocks), None)
