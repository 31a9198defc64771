"""Find the blocks and the layers of a model, and everything that belongs to neither."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layout import plain_tensors

BLOCK_LISTS = (
    "blocks",
    "vace_blocks",
    "double_blocks",
    "single_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
)
# modules that compute with the weights of their children without calling them
ATOMIC_TYPES = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer)


class NoBlocks(ValueError):
    """The model has none of the block lists that were looked for."""


@dataclass(frozen=True)
class Scope:
    """What of a model the engine takes over.

    outside: also what lies outside the blocks; if not, its host goes on placing that.
    leave: names of parameters and buffers in blocks that stay where they are.
    called_alone: names of parts of a block that are also called by others than the block.
    whole: names of parts that compute with the weights of their children without calling them.
    repeat: the method of the model that is called again when memory ran out in it.
    """

    outside: bool = True
    leave: frozenset[str] = frozenset()
    called_alone: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    repeat: str = "forward"


WHOLE = Scope()


@dataclass(frozen=True)
class Slotted:
    """A parameter or buffer in its module: ``owner[name]`` is where the module looks it up."""

    path: str
    owner: dict[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    is_buffer: bool = False


@dataclass
class Layer:
    """What is loaded when ``module`` is called: the tensors of ``module`` and, for an atomic one, of all below it.
    ``block`` is the index of its block, None outside the block lists. ``around``: its tensors, tables and scales mostly,
    are needed at other times too: while layers below it compute, or before it is called."""

    path: str
    module: nn.Module
    block: int | None
    tensors: list[Slotted] = field(default_factory=list)
    around: bool = False

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(slotted.tensor) for slotted in self.tensors)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor; a quantized subclass tells its own, a sparse tensor that of its parts."""
    if tensor.layout is torch.strided:
        return int(tensor.nbytes)
    if tensor.layout is torch.sparse_coo:
        return int(tensor._indices().nbytes + tensor._values().nbytes)
    return int(tensor.numel() * tensor.element_size())


def own_tensors(module: nn.Module, path: str) -> Iterator[Slotted]:
    """Parameters and buffers that ``module`` holds itself."""
    for owner in (module._parameters, module._buffers):
        for name, tensor in owner.items():
            if tensor is not None:
                yield Slotted(f"{path}.{name}" if path else name, owner, name, tensor, owner is module._buffers)


def find_blocks(root: nn.Module, names: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The blocks of ``root`` with their paths, in order of definition: the items of each module list whose name (the
    last part of its path, or the whole path) is in ``names``, by default BLOCK_LISTS; a name with a dot before it is a
    whole path only. Lists inside blocks do not count.

    Raises NoBlocks, saying what was looked for and which lists there are.
    """
    wanted = tuple(names) if names is not None else BLOCK_LISTS
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    lists: list[str] = []
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) and (names is None or not {path, f".{path}"} & {*wanted}):
            continue
        lists.append(path)
        named = path in wanted or path.rpartition(".")[2] in wanted or f".{path}" in wanted
        if named and not path.startswith(inside or ("\0",)):
            found += [(f"{path}.{name}", child) for name, child in module.named_children()]
            inside = (*inside, f"{path}.")
    if not found:
        raise NoBlocks(
            f"{type(root).__name__} has no list of blocks named {', '.join(wanted)}"
            + (f"; its module lists are {', '.join(lists)}" if lists else " and no module list at all")
            + ". Name its block lists to stream it."
        )
    return found


def _is_atomic(module: nn.Module) -> bool:
    if isinstance(module, ATOMIC_TYPES) or parametrize.is_parametrized(module):
        return True
    return not any(any(own_tensors(child, "")) for child in module.modules() if child is not module)


def _computes_elsewhere(module: nn.Module) -> bool:
    """Whether the tensors of ``module`` are used outside its ``forward``: it has none (a ParameterList), or a hook of
    torch's computes the weight before (weight_norm, spectral_norm)."""
    return type(module).forward is nn.Module.forward or any(
        type(hook).__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()
    )


def layers_of(
    module: nn.Module, path: str, block: int | None, skip: Sequence[str] = (), whole: frozenset[str] = frozenset()
) -> Iterator[Layer]:
    """The layers of ``module`` in order of definition: its leaves and atomic modules that hold tensors, modules named in
    ``whole``, and each other module that holds tensors itself (with those only). Subtrees whose path is in ``skip`` are left
    out."""
    if path in skip:
        return
    if path.rpartition(".")[2] in whole or _is_atomic(module):
        tensors = [
            slotted
            for name, child in module.named_modules()
            for slotted in own_tensors(child, f"{path}.{name}" if name else path)
        ]
        if tensors:
            yield Layer(path, module, block, tensors, around=_computes_elsewhere(module))
        return
    own = list(own_tensors(module, path))
    if own:
        yield Layer(path, module, block, own, around=True)
    for name, child in module.named_children():
        yield from layers_of(child, f"{path}.{name}" if path else name, block, skip, whole)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is what torch.compile made of another one. Does not import the compiler."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _layers_of_compiled(block: nn.Module, path: str, index: int, called_alone: frozenset[str]) -> Iterator[Layer]:
    """A compiled block is one layer, for a gate inside would break its graph; but for parts that are called alone."""
    whole, alone = Layer(path, block, index), []
    for layer in layers_of(block._orig_mod, f"{path}._orig_mod", index):
        if layer.around or called_alone.intersection(layer.path[len(path) :].split(".")):
            alone.append(layer)
        else:
            whole.tensors.extend(layer.tensors)
    yield whole
    yield from alone


def shared_tensors(layers: Sequence[Layer]) -> set[int]:
    """``id`` of each tensor that lies in the memory of another one, or occurs more than once: tied weights."""
    counts = Counter(id(slotted.tensor) for layer in layers for slotted in layer.tensors)
    shared = {tensor for tensor, count in counts.items() if count > 1}
    spans = sorted(
        (part.data_ptr(), part.data_ptr() + tensor_bytes(part), id(slotted.tensor))
        for layer in layers
        for slotted in layer.tensors
        for part in plain_tensors(slotted.tensor)
        if part.layout is torch.strided and tensor_bytes(part)
    )
    end, owner = 0, 0
    for first, last, tensor in spans:
        if first < end and tensor != owner:
            shared |= {tensor, owner}
        if last > end:
            end, owner = last, tensor
    return shared


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart: the layers inside blocks and those outside, each in order of definition."""

    inside: tuple[Layer, ...]
    outside: tuple[Layer, ...]


def take_apart(root: nn.Module, names: Sequence[str] | None = None, scope: Scope = WHOLE) -> Anatomy:
    """Blocks and layers of ``root``, as far as ``scope`` goes. A module that occurs twice (a block that is used twice)
    counts once.

    Raises NoBlocks, and ValueError for parameters on the meta device.
    """
    blocks = find_blocks(root, names)
    inside: list[Layer] = []
    seen: set[int] = set()
    for index, (path, block) in enumerate(blocks):
        compiled = is_compiled(block)
        layers = (
            _layers_of_compiled(block, path, index, scope.called_alone)
            if compiled
            else layers_of(block, path, index, whole=scope.whole)
        )
        for layer in layers:
            if id(layer.module) not in seen:
                seen.add(id(layer.module))
                layer.tensors = [slotted for slotted in layer.tensors if slotted.name not in scope.leave]
                inside.append(layer)
    outside: list[Layer] = []
    if scope.outside:
        paths = [path for path, _ in blocks]
        outside = [layer for layer in layers_of(root, "", None, paths, scope.whole) if id(layer.module) not in seen]
    meta = [slotted.path for layer in [*outside, *inside] for slotted in layer.tensors if slotted.tensor.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} parameters of {type(root).__name__} are on the meta device and have no data, "
            f"{meta[0]} first; load the weights before block swap is attached"
        )
    return Anatomy(tuple(inside), tuple(outside))
