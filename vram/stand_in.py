"""A model that has only sizes, for the engine's own rules to run on before anything is loaded.

Its modules are made from the names of weights, and each weight is no tensor but what the engine looks at of one. Which layers
stream, what stays beside them and how layers share segments is then decided by ``sort_tensors`` and ``arrange``, as for the
loaded model. What a name does not tell is taken to be the usual: a module is called for
its weights, unless it is one of torch's that is known to do otherwise; no two weights are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from .layout import align


class _Weight:
    """What the engine looks at of a tensor. Only the size is true: ``address`` is made up, so that no two overlap."""

    __slots__ = ("_address", "nbytes")
    layout = torch.strided
    is_meta = False

    def __init__(self, nbytes: int, address: int) -> None:
        self.nbytes = nbytes
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Called(nn.Module):
    """A module that is called for its weights."""

    def forward(self) -> None:
        """Never called: there is nothing to compute with."""
        raise NotImplementedError


_NONE: Mapping[str, Any] = MappingProxyType({})
_ENCODER_LAYER = {"self_attn", "linear1", "linear2", "norm1", "norm2"}


class Sized(NamedTuple):
    """A weight by name that takes ``nbytes``; ``is_buffer`` where it is no parameter."""

    name: str
    nbytes: int
    is_buffer: bool = False


class _Node:
    """A module to be: its parameters, buffers and children."""

    __slots__ = ("buffers", "children", "parameters")

    def __init__(self) -> None:
        self.parameters: dict[str, _Weight] = {}
        self.buffers: dict[str, _Weight] = {}
        self.children: dict[str, _Node] = {}


def stand_in(weights: Iterable[Sized], order: Sequence[str] = (), keep_order: bool = False) -> nn.Module:
    """A module tree with ``weights``, named as they are, each part of a name a module.

    Modules beside each other are in the order that their names have in ``order``, numbered ones by number; others come
    after these: in the order of ``weights`` with ``keep_order``, else by name.
    """
    rank = {name: number for number, name in enumerate(dict.fromkeys(order))}

    def place(name: str) -> tuple[int, int, str]:
        return rank.get(name, len(rank)), int(name) if name.isdecimal() else -1, "" if keep_order else name

    root = _Node()
    nodes, address = {"": root}, align(1)
    for full_name, nbytes, is_buffer in weights:
        name = full_name.rpartition(".")[2]
        path = full_name.removesuffix(name)
        node = nodes.get(path)
        if node is None:
            node = root
            for part in path.split(".")[:-1]:
                node = node.children.setdefault(part, _Node())
            nodes[path] = node
        (node.buffers if is_buffer else node.parameters)[name] = _Weight(nbytes, address)
        address += align(nbytes)
    return _module("", root, place)


def _module(name: str, node: _Node, place: Callable[[str], tuple]) -> nn.Module:
    """The module of ``node``: what the engine looks at of one, without the dozen dictionaries that ``nn.Module.__init__``
    makes, which would be half of the time."""
    kind = _kind(name, node)
    children = sorted(node.children, key=place) if len(node.children) > 1 else node.children
    module = kind.__new__(kind)
    module.__dict__.update(
        _parameters=node.parameters or _NONE,
        _buffers=node.buffers or _NONE,
        _modules={child: _module(child, node.children[child], place) for child in children},
        _forward_pre_hooks=_NONE,
    )
    return module


def _kind(name: str, node: _Node) -> type[nn.Module]:
    own = node.parameters.keys()
    if not own and node.children and all(child.isdecimal() for child in node.children):
        return nn.ModuleList
    if name == "parametrizations":
        return nn.ModuleDict
    if "in_proj_weight" in own and "out_proj" in node.children:
        return nn.MultiheadAttention
    if node.children.keys() == _ENCODER_LAYER and "in_proj_weight" in node.children["self_attn"].parameters:
        return nn.TransformerEncoderLayer
    # a ParameterList, and a weight that torch's weight_norm computes in a hook
    if own and (all(weight.isdecimal() for weight in own) or own >= {"weight_g", "weight_v"}):
        return nn.Module
    return _Called
