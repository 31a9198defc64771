"""What IntelligentVRAMNode asks of ComfyUI: which model is meant, how large it is, and how fast the host attends on this card."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.ops
import folder_paths
import torch
from torch.nn import functional

from .. import hardware
from ..device import attention_rate
from ..model_facts import ModelFacts, facts_of_tensors, read_model
from .comfy import ROOT
from .traits import COMFY, WANVIDEO
from .wan_classes import transformer_classes

log = logging.getLogger(__name__)

FOLDERS = ("diffusion_models", "unet_gguf", "checkpoints")


def model_names() -> list[str]:
    """Model files that ComfyUI offers to load, by the names that ``file_of`` takes."""
    known = [folder for folder in FOLDERS if folder in folder_paths.folder_names_and_paths]
    return list(dict.fromkeys(name for folder in known for name in folder_paths.get_filename_list(folder)))


def file_of(name: str) -> str:
    """The path of a model that ``model_names`` listed. Raises FileNotFoundError."""
    for folder in FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            path = folder_paths.get_full_path(folder, name)
            if path is not None:
                return path
    raise FileNotFoundError(f"{name} is in none of ComfyUI's folders {', '.join(FOLDERS)}; refresh the list of models")


def is_wanvideo(model: Any) -> bool:
    """Whether ``model`` is a WANVIDEOMODEL, and not a MODEL."""
    return isinstance(getattr(model.model, ROOT, None), tuple(transformer_classes()))


def facts_of(model: Any) -> ModelFacts:
    """The sizes of a loaded MODEL or WANVIDEOMODEL, as far as its loader has gone."""
    transformer = getattr(model.model, ROOT)
    if is_wanvideo(model):
        state = model.model["sd"]
        if state is not None:
            return facts_of_tensors(state, "WANVIDEOMODEL")
    tensors = dict(transformer.named_parameters()) | dict(transformer.named_buffers())
    return facts_of_tensors(tensors, type(model.model).__name__)


def choose_facts(model: Any, name: str | None) -> ModelFacts | None:
    """The facts of the connected model, else of the file ``name``, else None."""
    if model is not None:
        return facts_of(model)
    return read_model(file_of(name)) if name is not None else None


def choose_host(model: Any, facts: ModelFacts | None) -> str:
    """Whose sampler will run the model: that of its type; of a Wan file WanVideoWrapper's where that is installed."""
    if model is not None:
        return WANVIDEO if is_wanvideo(model) else COMFY
    return WANVIDEO if facts is not None and facts.family == "Wan" and transformer_classes() else COMFY


def measure(host: str = COMFY) -> tuple[hardware.Hardware, float | None]:
    """The device that ComfyUI uses, and FLOP/s of ``host``'s attention (None: as torch's own, which WanVideoWrapper calls)."""
    device = comfy.model_management.get_torch_device()
    card = hardware.measure(device)
    if host == WANVIDEO:
        return card, None
    attend = getattr(comfy.ops, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
    return card, attention_rate(torch.device(device), attend)
