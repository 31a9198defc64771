"""WanVideoWrapper's transformer classes: whether they are what block swap was made for, and how it meets their instances."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .traits import BLOCKS

MODEL_MODULE = ".wanvideo.modules.model"
ATTRIBUTES = ("blocks_to_swap", "vace_blocks_to_swap", "prefetch_blocks", "patched_linear", "offload_txt_emb")
DEVICES = ("main_device", "offload_device")
METHODS = ("forward", "block_swap")
INHERITED = ("named_parameters", "_apply")


def examine(transformer: Any) -> str | None:
    """Why ``transformer`` cannot be managed: what was looked for and what was found. None when it can."""
    kind = type(transformer)
    if not isinstance(transformer, nn.Module):
        return f"looked for a transformer, found {kind.__name__}"
    missing = [name for name in ATTRIBUTES + DEVICES if not hasattr(transformer, name)]
    missing += [f"{name}()" for name in METHODS if not callable(getattr(kind, name, None))]
    missing += [f"nn.Module's own {name}()" for name in INHERITED if getattr(kind, name) is not _inherited(kind, name)]
    if not isinstance(getattr(transformer, BLOCKS, None), nn.ModuleList):
        missing.append(f"a module list {BLOCKS}")
    if missing:
        return (
            f"looked for {', '.join(missing)} in {kind.__module__}.{kind.__name__}, as WanVideoWrapper 1.4 has it, and "
            f"did not find {'it' if len(missing) == 1 else 'them'}; {_version_found(kind)}"
        )
    return None


def _inherited(kind: type, name: str) -> Callable:
    watcher = _watchers.get(kind)
    return watcher.function if watcher is not None and name == "named_parameters" else getattr(nn.Module, name)


def _version_found(kind: type) -> str:
    """The version of the node pack that ``kind`` is of, by its pyproject.toml."""
    package = sys.modules.get(kind.__module__.removesuffix(MODEL_MODULE))
    for folder in getattr(package, "__path__", ()):
        project = Path(folder) / "pyproject.toml"
        version = re.search(r'^version = "(.+?)"', project.read_text("utf-8"), re.M) if project.is_file() else None
        if version is not None:
            return f"it is version {version[1]} of {Path(folder).name}"
    return "its version is not known"


def transformer_classes() -> list[type]:
    """The transformer classes of each WanVideoWrapper that is loaded in this process."""
    modules = [module for name, module in list(sys.modules.items()) if name.endswith(MODEL_MODULE)]
    return [module.WanModel for module in modules if isinstance(getattr(module, "WanModel", None), type)]


class _Watcher:
    """``named_parameters`` of a class of transformers replaced, as long as one of its tokens lives."""

    def __init__(self, kind: type, function: Callable) -> None:
        self.kind = kind
        self.function = function
        self.tokens = 0
        kind.named_parameters = function

    def let_go(self) -> None:
        self.tokens -= 1
        if self.tokens == 0:
            del _watchers[self.kind], self.kind.named_parameters


_watchers: dict[type, _Watcher] = {}


def watch_classes(token: object, named_parameters: Callable) -> str | None:
    """Let ``named_parameters`` be that method of all transformer classes for as long as ``token`` lives. Returns what was
    looked for and not found, None when all is well."""
    kinds = transformer_classes()
    if not kinds:
        return "looked for wanvideo.modules.model.WanModel of ComfyUI-WanVideoWrapper, and it is not loaded"
    for kind in kinds:
        if kind not in _watchers and "named_parameters" in kind.__dict__:
            return f"looked for nn.Module's own named_parameters() in {kind.__module__}.WanModel, which has another"
    for kind in kinds:
        watcher = _watchers.get(kind) or _watchers.setdefault(kind, _Watcher(kind, named_parameters))
        watcher.tokens += 1
        weakref.finalize(token, watcher.let_go)
    return None
