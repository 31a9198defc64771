"""Which weights of a model are quantized, and why the others are not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..vram.model_facts import FLOATS, ModelFacts
from ..vram.model_headers import Weight
from .formats import Format

if sys.version_info >= (3, 11):
    from re import _parser as parser
else:
    import sre_parse as parser

MOST_OPEN = 3  # names are up to a few hundred characters long, and there are thousands
LONG_REPEAT = 50

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

    def reason(layer: str, shape: tuple[int, ...]) -> str | None:
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

    return _sorted_by(facts, lambda layer, shape: TABLE if _TABLE.search(layer) else None)


def _sorted_by(facts: ModelFacts, reason: Callable[[str, tuple[int, ...]], str | None]) -> Choice:
    """Weights of linear layers that are floats and that ``reason``, given the layer's name and the shape, does not keep."""

    def why_kept(weight: Weight) -> str | None:
        layer = weight.name.removesuffix(".weight")
        if layer == weight.name or len(weight.shape) != 2:
            return NO_MATRIX
        if weight.dtype not in FLOATS:
            return NO_FLOAT
        return reason(layer, weight.shape)

    reasons = {weight.name: why_kept(weight) for weight in facts.weights}
    return Choice(
        tuple(name for name, why in reasons.items() if why is None),
        {name: why for name, why in reasons.items() if why is not None},
    )


def _compiled(keep: str | None) -> re.Pattern[str] | None:
    """The pattern; refused where searching for it could take longer than anybody waits."""
    if not keep:
        return None
    try:
        pattern = re.compile(keep, re.IGNORECASE)
        open_ended = _open_ended(parser.parse(keep))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern of what to keep, {keep[:200]!r}, is no regular expression: {error}") from None
    if open_ended > MOST_OPEN:
        raise ValueError(
            f"the pattern of what to keep, {keep[:200]!r}, could take for ever: one alternative of it repeats without an end "
            f"{open_ended} times, or repeats a repetition; use at most {MOST_OPEN} of * and + in each, none inside another"
        )
    return pattern


def _open_ended(parsed: Iterable[Any]) -> int:
    """Repetitions without an end in a parsed pattern, of alternatives the most; one inside another counts as too many."""
    count = 0
    for kind, argument in parsed:
        inner = [part for part in _subpatterns(argument) if part is not argument]
        inside = max(map(_open_ended, inner), default=0)
        if str(kind) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[1] > LONG_REPEAT:
            count += 1 + (inside and MOST_OPEN)
        else:
            count += inside
    return count


def _subpatterns(argument: Any) -> Iterator[Any]:
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _subpatterns(part)


def _block_of(layer: str, blocks: set[str]) -> str | None:
    """The block that a layer is in, or is."""
    parts = layer.split(".")
    return next((path for end in range(2, len(parts) + 1) if (path := ".".join(parts[:end])) in blocks), None)
