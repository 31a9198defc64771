"""Attributes that the engine sets on module instances, and takes off again without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MISSING = object()

MARK = "_intelligent_vram"


class InstancePatches:
    """Instance attributes of modules replaced reversibly: ``restore`` puts back exactly what was there."""

    def __init__(self) -> None:
        self._saved: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give ``module`` itself an attribute ``name``, hiding that of its class."""
        self._saved.append((module, name, module.__dict__.get(name, _MISSING)))
        module.__dict__[name] = value

    def __bool__(self) -> bool:
        return bool(self._saved)

    def restore(self) -> None:
        """Undo everything, newest first."""
        while self._saved:
            module, name, value = self._saved.pop()
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def gate(original: Callable, enter: Callable[[], None], leave: Callable[[], None]) -> Callable:
    """``original`` between ``enter`` and ``leave``. ``leave`` runs whatever happens, also on KeyboardInterrupt and on
    ComfyUI's interruption, which module hooks do not see. torch.compile leaves the gate itself alone and compiles
    ``original``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        enter()
        try:
            return original(*args, **kwargs)
        finally:
            leave()

    return marked(hide_from_compile(forward, recursive=False))


def marked(function: Callable, keeps: object = None) -> Callable:
    """``function`` recognisable as one of the engine's gates, which keeps what is given as ``keeps`` alive."""
    setattr(function, MARK, keeps)
    return function


def hide_from_compile(function: Callable, recursive: bool = True) -> Callable:
    """``function`` as torch.compile leaves it alone; with ``recursive`` also what it calls.

    Importing torch's compiler takes seconds. Where nobody has imported it yet, the function is only marked, which is
    what the compiler looks for when it comes to inline it (torch/_dynamo/eval_frame.py, ``skip``).
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function, recursive=recursive)
    function._torchdynamo_disable = True
    return function


def as_function(method: Callable) -> Callable:
    """A bound method as a function, which takes attributes."""

    def function(*args: Any) -> Any:
        return method(*args)

    return function


def stay(module: nn.Module) -> Callable:
    """An ``_apply`` for a module whose own tensors the engine places: ``.to()``, ``.cuda()``, ``.half()`` and the like
    pass them by and go on to its children."""

    def _apply(fn: Callable, recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                child._apply(fn)
        return module

    return _apply
