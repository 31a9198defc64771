"""Block swap for ComfyUI's own models: a ModelPatcher that streams.

ComfyUI hands models around as patchers: copies that share one module and differ in their patches. Its model management
asks a patcher to load (``partially_load``), for its size, to give memory back (``partially_unload``) and to go
(``detach``). The class below answers these with a Swap on the model's transformer; everything else is the host's own.
Works with ComfyUI 0.3.64 and later; nothing of the host is changed.
"""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections import namedtuple
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from .. import limit
from ..coding import decode_all
from ..config import SwapConfig
from ..device import why_not_stream
from ..discover import Scope, find_blocks
from ..encoded import EncodedTensor
from ..memory import snapshot
from ..patches import Patches
from ..swap import Swap, attach
from ..units import GIB
from . import panel
from .comfy_model import cast_to_model_dtype, fused, repeated, static
from .comfy_state import HostProgress, PatchIdentity, State
from .report import report

log = logging.getLogger(__name__)

ROOT = "diffusion_model"
FORCE = "INTELLIGENT_VRAM_FORCE"
ACTIVATIONS = 2 * GIB  # beside weights, for deciding whether other models are in the way

_Backup = namedtuple("Backup", ["weight", "inplace_update"])


def reason_to_pass(device: torch.device) -> str | None:
    """Why block swap leaves a model on ``device`` alone, in words; None when it does not."""
    reason = why_not_stream(device)
    if reason is None or device.type != "cpu":
        return reason
    return None if os.environ.get(FORCE) == "1" else f"{reason} (set {FORCE}=1 to stream all the same)"


def wrap(model: Any, config: SwapConfig) -> Any:
    """A copy of the MODEL ``model`` whose blocks are streamed as ``config`` says; ``model`` itself where the device has
    nothing to stream to. Patches made before and after both count.

    Raises NoBlocks for a model without blocks, and TypeError for a patcher that places weights in a way of its own.
    """
    reason = reason_to_pass(model.load_device)
    if reason is not None:
        log.info("block swap: the model is passed through unchanged: %s", reason)
        return model
    find_blocks(getattr(model.model, ROOT), config.block_names)
    still = static(model)
    cast_to_model_dtype(still.model)
    patcher = still.clone()
    patcher.__class__ = _streamed_class(type(still))
    patcher.swap_config, patcher.swap_node = config, panel.executing_node()
    patcher.offload_device = torch.device("cpu")
    return patcher


@lru_cache(maxsize=8)
def _streamed_class(base: type) -> type:
    """``base`` with streaming. Refuses patchers that load weights in another way than ComfyUI's."""
    if issubclass(base, StreamedPatcher):
        return base
    plain = comfy.model_patcher.ModelPatcher
    for method in ("load", "patch_weight_to_device"):
        if getattr(base, method) is not getattr(plain, method):
            raise TypeError(
                f"block swap cannot take over a model of {base.__module__}.{base.__name__}, which has its own {method}; "
                "load the model with one of ComfyUI's loaders"
            )
    return type(f"Streamed{base.__name__}", (StreamedPatcher, base), {})


class StreamedPatcher:
    """Mixed into the host's ModelPatcher. All copies made by ``clone`` stream too."""

    swap_config: SwapConfig
    swap_node: str | None = None

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        copy = super().clone(*args, **kwargs)
        copy.swap_config, copy.swap_node = self.swap_config, self.swap_node
        return copy

    @property
    def _state(self) -> State:
        if "intelligent_vram_state" not in self.model.__dict__:
            self.model.__dict__["intelligent_vram_state"] = State()
        return self.model.__dict__["intelligent_vram_state"]

    @property
    def swap(self) -> Swap | None:
        """The swap that this patcher, and not another copy, has attached."""
        state = self._state
        return state.swap if state.owner == id(self) else None

    # -- what model management asks --------------------------------------------------------------------------------

    def loaded_size(self) -> int:
        """Bytes of device memory that the model takes now."""
        swap = self._state.swap
        return super().loaded_size() + (swap.device_bytes if swap is not None else 0)

    def get_free_memory(self, device: torch.device) -> int:
        """What sampling may think is free, for deciding how much to batch: not more than the limit leaves."""
        host = getattr(super(), "get_free_memory", comfy.model_management.get_free_memory)
        free, swap = host(device), self.swap
        if swap is None or device.type != "cuda":
            return free
        return max(0, min(free, swap.limit - torch.cuda.memory_allocated(device)))

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Load the model: attach block swap, or go on with what is attached."""
        state = self._state
        state.take_back()
        if force_patch_weights:  # older hosts, about to save the model: its own weights are to be the patched ones
            self._lay_bare()
            return super().partially_load(device_to, extra_memory, force_patch_weights=True)
        key = self._key(device_to)
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            if self.swap is not None and state.key == key:
                panel.attached(self.swap, self.swap_node)
                self.patch_model(load_weights=False)
                self.apply_hooks(self.forced_hooks, force_apply=True)
                return 0
            before = self.loaded_size()
            self.unpatch_model(self.offload_device, unpatch_weights=True)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
            except BaseException:
                self.detach()
                raise
            state.key = key
            return self.loaded_size() - before

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        """Attach block swap to the transformer, with this patcher's patches packed in."""
        if kwargs.get("force_patch_weights"):
            return super().load(device_to, *args, **kwargs)
        device_to = device_to or self.load_device
        with self.use_ejected():
            self._suspend()
            self.unpatch_hooks()
            self._set_weight_functions(device_to)
            self._make_room(device_to)
            state, root = self._state, getattr(self.model, ROOT)
            state.swap = attach(
                root,
                self.swap_config,
                device_to,
                scope=Scope(whole=fused(root), repeat=repeated(root)),
                patches=self._patches(),
                packed=state.packed,
                progress=HostProgress(),
            )
            state.packed, state.owner = None, id(self)
            state.reported = 0
            panel.attached(state.swap, self.swap_node)
            self._back_up()
            self.model.to(device_to)
            self.model.device = device_to
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_LOAD):
                callback(self, device_to, 0, False, False)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        """The weights as the host writes them to a file, which patches them itself, one at a time. While block swap is
        attached they are partly patched already; it is attached again when the model is used."""
        self._lay_bare()
        return super().model_state_dict_for_saving(*args, **kwargs)

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0, *args: Any, **kwargs: Any) -> int:
        """Give back resident units at once. What slots and the rest take goes with ``detach``."""
        return self.swap.evict(int(min(memory_to_free, 1 << 60))) if self.swap is not None else 0

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self._suspend()
        super().unpatch_model(device_to, unpatch_weights)

    def detach(self, unpatch_all: bool = True) -> Any:
        """Take block swap off if this copy attached it; with ``unpatch_all`` False another copy, or the same, is about to
        be loaded, and may go on with it. The packed weights stay in RAM for the next run."""
        if self.swap is not None:
            if unpatch_all:
                self._suspend()
            else:
                self._state.hand_over(self.model)
        return super().detach(unpatch_all)

    def __del__(self) -> None:
        if "model" in self.__dict__ and self.swap is not None:
            self._suspend()
            super().unpatch_model(self.offload_device, True)
        super().__del__()

    def cleanup(self) -> None:
        """The host calls this when sampling is over: say what happened."""
        super().cleanup()
        if self.swap is not None:
            self._state.reported = report(self.swap, self._state.reported)
            panel.finished(self.swap)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _suspend(self) -> None:
        state = self._state
        if state.swap is not None:
            state.suspend()
            log.debug("block swap taken off %s; its packed weights stay in RAM", type(self.model).__name__)

    def _lay_bare(self) -> None:
        """The model as it was loaded, for a host that reads its weights, those of an encoded file decoded too."""
        self._state.lay_bare()
        encoded = [weight for weight in self.model.parameters() if isinstance(weight, EncodedTensor)]
        if encoded:  # also those that the host moved, which hold plain values
            self._state.packed = None
            decode_all(encoded, self.load_device)

    def _make_room(self, device: torch.device) -> None:
        """Let the host unload models that the present sampling does not use, where they take what the limit allows to
        this one. (The host unloads only what the whole card has no room for.)"""
        if device.type != "cuda":
            return
        now = snapshot(device)
        allowed = self.swap_config.max_vram or limit.automatic_limit(now)
        room = limit.torch_budget(allowed, now) - now.allocated
        wanted = min(allowed, self.model_size() + ACTIVATIONS)
        if room >= wanted:
            return
        listed = comfy.model_management.current_loaded_models
        # what the host is loading in the same call it has taken off its list, or marked as used since
        keep = [loaded for loaded in listed if loaded.currently_used]
        # the list holds models weakly: one that the garbage collector takes meanwhile would break the host's walk over it
        there = [loaded.model for loaded in listed]
        free = comfy.model_management.get_free_memory(device)
        comfy.model_management.free_memory(free + wanted - room, device, keep_loaded=keep)
        del there

    def _key(self, device: torch.device) -> Hashable:
        """What must be the same for an attached swap to go on."""
        return (
            self.patches_uuid,
            self.swap_config,
            device,
            self.force_cast_weights,
            tuple((name, id(patch)) for name, patch in sorted(self.object_patches.items(), key=lambda item: item[0])),
        )

    def _patches(self, hooked: dict[str, list] | None = None) -> Patches:
        """This patcher's LoRAs as the engine packs them: made by the host's own code, on the device, once. ``hooked`` are
        further patches of hooks, by key. The swap must not keep this patcher: the host lets go of a model by forgetting it."""
        hooked, patcher = hooked or {}, weakref.proxy(self)

        def key_of(path: str) -> str:
            return f"{ROOT}.{path.replace('_orig_mod.', '')}"

        def signature(path: str) -> Hashable | None:
            key = key_of(path)
            patches = (*patcher.patches.get(key, ()), *hooked.get(key, ()))
            # the patches themselves are part of the signature: while it is kept, so is what their id names
            return tuple(PatchIdentity(patch) for patch in patches) or None

        def apply(path: str, tensor: torch.Tensor) -> torch.Tensor:
            return patcher._patched_weight(key_of(path), tensor, hooked.get(key_of(path)))

        return Patches(signature, apply)

    def _patched_weight(self, key: str, original: torch.Tensor, hooked: list | None) -> torch.Tensor:
        """The weight ``key`` as the host patches it when it loads a model whole; ``original`` stays as it is."""
        module, name = self._resolve(key)
        if key in self.patches:
            if "return_weight" in inspect.signature(super().patch_weight_to_device).parameters:
                weight = super().patch_weight_to_device(key, device_to=self.load_device, return_weight=True)
            else:
                try:
                    super().patch_weight_to_device(key, device_to=self.load_device)
                    weight = getattr(module, name)
                finally:
                    self.backup.pop(key, None)
                    module._parameters[name] = original
        else:
            weight = original.to(self.load_device, copy=True)
        if hooked:
            patched = comfy.lora.calculate_weight(hooked, weight.to(torch.float32), key)
            seed = comfy.model_patcher.string_to_seed(key)
            weight = comfy.float.stochastic_rounding(patched, original.dtype, seed=seed)
        return weight

    def _resolve(self, key: str) -> tuple[torch.nn.Module, str]:
        path, _, name = key.rpartition(".")
        return comfy.utils.get_attr(self.model, path), name

    def _set_weight_functions(self, device: torch.device) -> None:
        """Casts and wrappers that the host puts on layers of a loaded model, set as its own ``load`` does."""
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            comfy.model_patcher.wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            wrappers = {kind: self.weight_wrapper_patches.get(f"{name}.{kind}", []) for kind in ("weight", "bias")}
            if not self.force_cast_weights and not any(wrappers.values()):
                continue
            module.prev_comfy_cast_weights = module.comfy_cast_weights
            module.comfy_cast_weights = True
            module.weight_function = [*wrappers["weight"]]
            module.bias_function = [*wrappers["bias"]]
            comfy.model_patcher.move_weight_functions(module, device)
            self.model.model_lowvram = True

    def _back_up(self) -> None:
        """The model's own weights, where the host looks for them when it merges models: what the layers hold meanwhile can be
        patched, and lies in memory that is used again."""
        self._state.backup = self.backup
        for slotted in self._state.swap.tensors():
            if isinstance(slotted.tensor, torch.nn.Parameter):  # the host puts them back as such
                self.backup[f"{ROOT}.{slotted.path}"] = _Backup(slotted.tensor, False)

    # -- hooks (weights that change during sampling) -----------------------------------------------------------------

    def patch_hooks(self, hooks: Any) -> None:
        """Weights patched for a span of the sampling: packed anew where they change."""
        swap = self.swap
        if swap is None:
            return super().patch_hooks(hooks)
        with self.use_ejected():
            hooked = self.get_combined_hook_patches(hooks=hooks) if hooks is not None else {}
            swap.repack(self._patches(hooked))
            self.current_hooks = hooks
        return None

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        swap = self.swap
        if swap is None:
            return super().unpatch_hooks(whitelist_keys_set)
        if self.current_hooks is not None:
            swap.repack(self._patches())
            self.current_hooks = None
        return None
