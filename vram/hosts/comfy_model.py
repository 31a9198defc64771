"""What block swap has to know of a model of ComfyUI's, and do to it, before it is streamed."""

from __future__ import annotations

import weakref
from typing import Any

import torch

FUSED = "linear_input_act"
INNER = "_forward"

_static_models: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def static(model: Any) -> Any:
    """``model`` as a patcher that does not fault its weights in by itself. ComfyUI loads it once from the file; copies of
    one dynamic model share what was loaded."""
    is_dynamic = getattr(model, "is_dynamic", None)
    if is_dynamic is None or not is_dynamic():
        return model
    known = _static_models.get(model.model)
    still = model.clone(disable_dynamic=True, model_override=known)
    if known is None:
        _static_models[model.model] = still.get_clone_model_override()
    return still


def cast_to_model_dtype(model: torch.nn.Module) -> None:
    """Weights in the dtype that the model computes in. ComfyUI 0.33 casts a dynamic model while its weights are faulted
    in; loaded without that, lazily loaded layers keep the file's dtype and would not compute (bf16 files of Wan, which it
    computes in fp16)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if dtype is not None and type(parameter) is torch.nn.Parameter and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def fused(root: torch.nn.Module) -> frozenset[str]:
    """Names of modules that hand a module below with an INT8 weight to ComfyUI's fused kernel instead of calling it
    (``comfy.ops.linear_input_act``)."""
    found = set()
    for path, module in root.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and FUSED in code.co_names:
            formats = {getattr(child, "quant_format", None) for child in module.modules()}
            if "int8_tensorwise" in formats:
                found.add(path.rpartition(".")[2])
    return frozenset(found)


def repeated(root: torch.nn.Module) -> str:
    """The method of a transformer that is called again when memory ran out: the one within the host's wrappers
    (``comfy.patcher_extension``), some of which count the calls that they see."""
    names = getattr(type(root).forward, "__code__", None)
    within = names is not None and {"new_class_executor", INNER} <= set(names.co_names) and hasattr(type(root), INNER)
    return INNER if within else "forward"
