"""Block swap for the models of ComfyUI-WanVideoWrapper: the same engine under its sampler.

At each run the wrapper loads weights into its transformer, moves parts of it, calls it once or more a step, and offloads
it. Four methods of the transformer instance, and nothing else of the wrapper, are ours while a run with our arguments
lasts: ``named_parameters``, through which it loads and offloads, passes packed weights by; ``_apply`` (``.to()``) leaves
blocks alone; ``block_swap`` does nothing; ``forward`` attaches the engine when it is called first. What lies outside the
blocks stays the wrapper's. A run without our arguments finds the transformer as the wrapper made it.

Works with WanVideoWrapper 1.4; what is looked for is in wan_classes.py.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ..contiguity import Guard
from ..discover import Scope, is_compiled
from ..gates import InstancePatches, hide_from_compile
from ..packing import PackedModel
from ..plan import within
from ..swap import Swap, attach
from . import panel
from .comfy import reason_to_pass
from .comfy_state import HostProgress
from .report import report
from .traits import BLOCKS, VACE_BLOCKS, WAN_BLOCKS, WAN_SCOPE, WANVIDEO, config_in
from .wan_arguments import KEY, Flag, Run, Settings, arguments, put_into, when_cloned
from .wan_classes import examine, watch_classes
from .wan_gguf import READERS, Readers, forget_weights

__all__ = ["Managed", "arguments", "examine", "manage", "watch", "wrap"]

log = logging.getLogger(__name__)


def _reason_to_refuse(transformer: nn.Module) -> str | None:
    """Why the engine leaves a run of a transformer that it could manage to the wrapper."""
    reason = reason_to_pass(torch.device(transformer.main_device))
    if reason is not None:
        return reason
    if getattr(transformer, "expanded_patch_embedding", None) is not getattr(
        transformer, "original_patch_embedding", None
    ):
        return "the model has a control LoRA, which WanVideoWrapper patches and takes off again while it samples"
    if any(hasattr(module, "onload") for module in transformer.modules()):
        return "the model was loaded with WanVideoVRAMManagement, which moves each layer itself"
    return None


class Managed:
    """Our hooks on one transformer. ``swap`` is the engine while it is attached. Made by ``manage``."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.swap: Swap | None = None
        self.guard: Guard | None = None
        self._packed: PackedModel | None = None
        self._run: weakref.ref[Run] | None = None
        self._last: Settings | None = None  # of the run whose weights are packed and passed by
        self._told = 0
        self._debug = self._used = False
        self._busy = False
        self._pipelines: list[tuple[dict, list]] = []
        self._entry = InstancePatches()
        self._active = InstancePatches()
        self._entry.set(transformer, KEY, self)
        self._entry.set(transformer, "named_parameters", self._named_parameters)

    def release(self) -> None:
        """Take everything off the transformer. Its weights are ordinary tensors then, those of blocks in host memory; of a
        GGUF model they are gone, until the sampler reads them."""
        self._stand_down()
        self._entry.restore()
        for pipeline, readers in self._pipelines:
            pipeline[READERS] = readers
        self._pipelines.clear()

    def take_readers(self, pipeline: Any) -> None:
        """Spare the wrapper from reading a GGUF file again whose weights are packed. ``pipeline`` is where the model keeps
        what its sampler needs."""
        readers = pipeline.get(READERS) if isinstance(pipeline, dict) else None
        if isinstance(readers, list) and not isinstance(readers, Readers):
            pipeline[READERS] = Readers(readers, self._packed_names)
            self._pipelines.append((pipeline, readers))

    def _packed_names(self) -> set[str]:
        if self._packed is None or self._settings() is None:
            return set()
        return {p.entry.path.replace("_orig_mod.", "") for layer in self._packed.layers for p in layer.entries}

    # -- whose run it is -------------------------------------------------------------------------------------------

    def _settings(self) -> Settings | None:
        """Those of the run that is under way, if it is one of ours."""
        flag = self.transformer.__dict__.get("offload_txt_emb")
        if isinstance(flag, Flag):
            self._begin(flag)
        run = self._run() if self._run is not None else None
        self._last = run.settings if run is not None else self._last
        return run.settings if run is not None else None

    def _begin(self, flag: Flag) -> None:
        """A run of ours begins, or goes on: from here on the transformer holds a plain value."""
        self.transformer.offload_txt_emb = bool(flag)
        if self._run is not None and self._run() is flag.run():
            return
        self._run = flag.run
        self._used = False
        self._settle()
        self._drop_guard()
        reason = _reason_to_refuse(self.transformer)
        if reason is not None:
            self._stand_down()
            log.info("block swap: %s. WanVideoWrapper moves the blocks, and the guard keeps them contiguous", reason)
            self._run = flag.run
            self.guard = Guard()
            for block in self._blocks():
                self.guard.add(block)
            self._active.set(self.transformer, "forward", self._make_guarded_forward())

    def _stand_by(self) -> None:
        """The hooks of a run of ours."""
        if not self._active:
            for name in ("forward", "_apply", "block_swap"):
                self._active.set(self.transformer, name, getattr(self, f"_make_{name.strip('_')}")())

    def _stand_down(self) -> None:
        """A run that is not ours begins: the transformer is the wrapper's alone."""
        self._settle()
        self._drop_guard()
        self._active.restore()
        if self._packed is not None:
            forget_weights(self._packed)
            self._packed.coding.decode()
        self._packed = self._run = self._last = None

    def _drop_guard(self) -> None:
        if self.guard is not None:
            if self.guard.mended:
                log.info("block swap: %d misaligned or strided weights were made contiguous", self.guard.mended)
            self.guard.remove()
            self._active.restore()
            self.guard = None

    def _settle(self) -> None:
        """Take the engine off; what it packed stays."""
        if self.swap is not None:
            self._tell(wait=True)
            report(self.swap, 0)
            panel.finished(self.swap)
            self._packed = self.swap.detach(keep_encoded=True)
            self.swap = None

    # -- the hooks ---------------------------------------------------------------------------------------------------

    def _named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapper is about to load, move or offload parameters: all but those that are packed."""
        if not self._busy and not (self.swap is not None and self.swap.computing):
            if self._used and not isinstance(self.transformer.__dict__.get("offload_txt_emb"), Flag):
                gc.collect()  # a run that ended in an exception may live on in its traceback
            if self._settings() is None:
                self._stand_down()
            elif self.guard is None:
                self._settle()
                self._stand_by()
        packed = self._packed or (self.swap.packed if self.swap is not None else None)
        hidden = {id(p.entry.host) for layer in packed.layers for p in layer.entries} if packed is not None else ()
        parameters = nn.Module.named_parameters(self.transformer, *args, **kwargs)
        return ((name, parameter) for name, parameter in parameters if id(parameter) not in hidden)

    def _make_apply(self) -> Callable:
        def _apply(fn: Callable, recurse: bool = True) -> nn.Module:
            transformer = self.transformer
            if self._busy or (self._settings() is None and not self._only_offloads(fn)):
                if not self._busy:
                    self._stand_down()
                return nn.Module._apply(transformer, fn, recurse)
            if self.swap is not None and self.swap.computing:
                return transformer
            self._settle()
            nn.Module._apply(transformer, fn, recurse=False)
            for name, child in transformer.named_children() if recurse else ():
                if name not in WAN_BLOCKS:
                    child._apply(fn)
            return transformer

        return _apply

    @staticmethod
    def _only_offloads(fn: Callable) -> bool:
        """Whether a function that is to be applied to all tensors moves them to host memory and does no more."""
        moved = fn(torch.empty(0, dtype=torch.bfloat16))
        return moved.device.type == "cpu" and moved.dtype is torch.bfloat16

    def _make_block_swap(self) -> Callable:
        original = self.transformer.block_swap

        def block_swap(blocks_to_swap: int, *args: Any, **kwargs: Any) -> None:
            if self._settings() is None:
                self._stand_down()
                original(blocks_to_swap, *args, **kwargs)

        return block_swap

    def _make_forward(self) -> Callable:
        transformer, original = self.transformer, self.transformer.forward
        prepare = hide_from_compile(lambda: self._prepare())

        def forward(*args: Any, **kwargs: Any) -> Any:
            if prepare():
                return transformer.forward(*args, **kwargs)  # the engine's, which comes back here
            return original(*args, **kwargs)

        return hide_from_compile(forward, recursive=False)

    def _make_guarded_forward(self) -> Callable:
        """For weights that are put on the device by other ways than ``.to()`` of a block, while loading."""
        original = self.transformer.forward

        def look() -> None:
            for block in self._blocks():
                self.guard.look(block)

        look = hide_from_compile(look)

        def forward(*args: Any, **kwargs: Any) -> Any:
            look()
            return original(*args, **kwargs)

        return hide_from_compile(forward, recursive=False)

    def _prepare(self) -> bool:
        """Before a forward: attach the engine if it is to be. True when it was attached just now."""
        if self.swap is not None:
            self._tell()
            return False
        settings = self._settings() or self._last
        if settings is None:  # called by others than a sampler
            self._active.restore()
            return False
        transformer = self.transformer
        transformer.blocks_to_swap = transformer.vace_blocks_to_swap = transformer.prefetch_blocks = 0
        transformer.block_swap_debug = transformer.use_non_blocking = False
        self._busy = True
        try:
            self.swap = attach(
                transformer,
                self._config(settings),
                transformer.main_device,
                packed=self._packed,
                progress=HostProgress(),
                scope=self._scope(),
            )
        finally:
            self._busy = False
        panel.attached(self.swap, panel.node_of(settings.token))
        self._packed, self._told, self._debug = None, 0, settings.debug
        self._used = True
        return True

    def _scope(self) -> Scope:
        """Compiled blocks see the index on the device, as without block swap: another graph would round differently."""
        compiled = any(is_compiled(block) for block in self._blocks())
        return replace(WAN_SCOPE, leave=frozenset()) if compiled else WAN_SCOPE

    def _config(self, settings: Settings) -> Any:
        lists = tuple(name for name in WAN_BLOCKS if isinstance(self._list(name), nn.ModuleList))
        config = config_in(WANVIDEO, settings.config, lists)
        asked = {"blocks": settings.blocks_to_swap, "VACE blocks": settings.vace_blocks_to_swap}
        if not any(asked.values()):
            return config
        there = {"blocks": len(self._list(BLOCKS) or ()), "VACE blocks": len(self._list(VACE_BLOCKS) or ())}
        count, remarks = within(asked, there)
        for remark in remarks:
            log.info("block swap: %s", remark)
        return replace(config, streamed_blocks=count)

    def _list(self, name: str) -> nn.ModuleList | None:
        return getattr(self.transformer, name, None)

    def _blocks(self) -> Iterator[nn.Module]:
        for name in WAN_BLOCKS:
            yield from self._list(name) or ()

    def _tell(self, wait: bool = False) -> None:
        """A line for each forward that is done, for a user who wants them."""
        if self.swap is None or not self._debug:
            return
        for record in self.swap.telemetry.records(wait):
            if record.index >= self._told:
                self._told = record.index + 1
                log.info("block swap: %s", record.describe())


def manage(transformer: nn.Module) -> Managed:
    """Put our hooks on ``transformer``, once. Raises TypeError, in the words of ``examine``, for what is not a
    transformer of WanVideoWrapper 1.4."""
    managed = transformer.__dict__.get(KEY)
    if managed is None:
        reason = examine(transformer)
        if reason is not None:
            raise TypeError(reason)
        managed = Managed(transformer)
    return managed


def wrap(model: Any, args: dict[str, Any]) -> Any:
    """A copy of the WANVIDEOMODEL ``model`` that samples with ``args`` (see ``arguments``); ``model`` itself, with a line
    in the log that says why, where there is nothing to stream to or it is not what it was looked for."""
    transformer = getattr(getattr(model, "model", None), "diffusion_model", None)
    reason = examine(transformer) or reason_to_pass(torch.device(transformer.main_device))
    if reason is not None:
        log.warning("block swap: the WANVIDEOMODEL is passed through unchanged: %s", reason)
        return model
    manage(transformer).take_readers(getattr(model.model, "pipeline", None))
    clone = model.clone()
    put_into(clone, args)
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, when_cloned)
    return clone


def watch(args: dict[str, Any]) -> str | None:
    """Let transformers that the wrapper gives ``args`` to be managed when their first run begins, for as long as ``args``
    or a copy of them lives. Returns what was looked for and not found, None when all is well."""
    panel.made(args[KEY].settings.token)
    return watch_classes(args[KEY].settings.token, _named_parameters_at_first)


def _named_parameters_at_first(transformer: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """``named_parameters``, which a run calls first, of a transformer that may have got our arguments."""
    if isinstance(transformer.__dict__.get("offload_txt_emb"), Flag):
        reason = examine(transformer)
        if reason is None:
            return manage(transformer).transformer.named_parameters(*args, **kwargs)
        transformer.offload_txt_emb = bool(transformer.offload_txt_emb)  # it is said once a run
        log.warning("block swap: WanVideoWrapper moves the blocks itself: %s", reason)
    return nn.Module.named_parameters(transformer, *args, **kwargs)
