"""The settings of our node on their way through WanVideoWrapper: its BLOCKSWAPARGS, with the run that they belong to.

The wrapper's sampler copies BLOCKSWAPARGS deeply when a run begins, sets their values on the transformer and lets the copy
go when the run is over. A flag among them therefore tells, on the transformer, whose run this is, and a weak reference
tells whether it still lasts.
"""

from __future__ import annotations

import copy
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

from ..config import SwapConfig

log = logging.getLogger(__name__)

KEY = "intelligent_vram"
ALL = 1000  # more blocks than any model has: the wrapper then loads all of them to its offload device
ARGUMENTS = "block_swap_args"
OPTIONS = "transformer_options"


class Token:
    """Lives as long as any arguments made with it."""


@dataclass(frozen=True)
class Settings:
    """What the user asks of block swap in the wrapper. ``blocks_to_swap`` and ``vace_blocks_to_swap``: stream exactly so
    many blocks, 0 and 0 is as many as the limit needs. ``debug``: a line in the log for each forward."""

    config: SwapConfig
    blocks_to_swap: int = 0
    vace_blocks_to_swap: int = 0
    debug: bool = False
    token: Token = field(default_factory=Token, compare=False)


class Run:
    """One run of the sampler, or arguments from which a run makes its own copy."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __deepcopy__(self, memo: dict) -> Run:
        return Run(self.settings)


class Flag(int):
    """A true or false argument of the wrapper that leads back to its run."""

    run: weakref.ref[Run]

    def __new__(cls, value: bool, run: Run) -> Flag:
        flag = super().__new__(cls, bool(value))
        flag.run = weakref.ref(run)
        return flag

    def __deepcopy__(self, memo: dict) -> int:
        run = self.run()
        return bool(self) if run is None else Flag(bool(self), copy.deepcopy(run, memo))


def arguments(
    config: SwapConfig,
    *,
    blocks_to_swap: int = 0,
    vace_blocks_to_swap: int = 0,
    offload_txt_emb: bool = False,
    offload_img_emb: bool = False,
    debug: bool = False,
) -> dict[str, Any]:
    """BLOCKSWAPARGS for the wrapper's nodes, with which our engine moves the blocks. See Settings."""
    run = Run(Settings(config, blocks_to_swap, vace_blocks_to_swap, debug))
    return {
        "blocks_to_swap": ALL,
        "vace_blocks_to_swap": ALL,
        "offload_txt_emb": Flag(offload_txt_emb, run),
        "offload_img_emb": bool(offload_img_emb),
        "use_non_blocking": False,
        "prefetch_blocks": 0,
        "block_swap_debug": False,
        KEY: run,
    }


def are_ours(value: Any) -> bool:
    """Whether BLOCKSWAPARGS come from ``arguments``."""
    return isinstance(value, dict) and isinstance(value.get(KEY), Run)


class KeptOptions(dict):
    """The transformer_options of a model behind our node: BLOCKSWAPARGS of the wrapper's own do not replace ours."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key == ARGUMENTS and are_ours(self.get(key)) and not are_ours(value):
            log.info("block swap: WanVideoSetBlockSwap comes after the block swap of this pack, which stays in charge")
            return
        super().__setitem__(key, value)


def put_into(patcher: Any, arguments: dict[str, Any]) -> None:
    """Let ``patcher``, a WANVIDEOMODEL, sample with ``arguments``, and all copies that are made of it."""
    options = patcher.model_options.get(OPTIONS, {})
    if options.get(ARGUMENTS) is not None and not are_ours(options[ARGUMENTS]):
        log.info("block swap: the model comes with settings of WanVideoBlockSwap; those of this pack replace them")
    _keep(patcher, {**options, ARGUMENTS: arguments})


def _keep(patcher: Any, options: dict[str, Any]) -> None:
    patcher.model_options[OPTIONS] = KeptOptions(options)


def when_cloned(_: Any, clone: Any) -> None:
    """For ComfyUI's ON_CLONE: its copies of model options are plain dictionaries."""
    options = clone.model_options.get(OPTIONS, {})
    if are_ours(options.get(ARGUMENTS)):
        _keep(clone, options)
