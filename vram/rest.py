"""Weights that do not stream: which they are, and how they live on the device while block swap is attached."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .coding import decoded_on
from .config import SwapConfig
from .discover import WHOLE, Layer, Scope, Slotted, shared_tensors, take_apart, tensor_bytes
from .encoded import is_encoded
from .layout import CannotPack, flatten, leaves
from .patches import Patches, patched
from .units import MIB

# Layers below 1 MiB and below 1/1024 of the weights are resident: copying them costs more in latency than they take.
SMALL_LAYER = 1 * MIB
SMALL_SHARE = 1024
# Buffers up to this size are state that others may write to while the model runs, such as a step counter.
STATE_BYTES = 512


def sort_tensors(root: nn.Module, config: SwapConfig, scope: Scope = WHOLE) -> tuple[list[Layer], list[Slotted]]:
    """Layers to pack, and tensors that simply live on the device: small layers and buffers, what lies around other
    layers, tied weights and, but for layerwise mode, everything outside the blocks."""
    anatomy = take_apart(root, config.block_names, scope)
    candidates = [*anatomy.inside]
    rest: list[Slotted] = []
    if config.mode == "layerwise":
        candidates = _in_order(root, [*anatomy.inside, *anatomy.outside])
    else:
        rest += [slotted for layer in anatomy.outside for slotted in layer.tensors]
    shared = shared_tensors([*anatomy.inside, *anatomy.outside])
    small = min(SMALL_LAYER, sum(layer.nbytes for layer in candidates) // SMALL_SHARE)
    streamed: list[Layer] = []
    for layer in candidates:
        single = [slotted for slotted in layer.tensors if not (id(slotted.tensor) in shared or _is_state(slotted))]
        rest += [slotted for slotted in layer.tensors if id(slotted.tensor) in shared or _is_state(slotted)]
        if layer.around or sum(tensor_bytes(slotted.tensor) for slotted in single) < small:
            rest += single
        elif single:
            streamed.append(Layer(layer.path, layer.module, layer.block, single))
    return streamed, rest


def _is_state(slotted: Slotted) -> bool:
    return slotted.is_buffer and tensor_bytes(slotted.tensor) <= STATE_BYTES


def _in_order(root: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Layers in the order in which their modules are defined."""
    position = {id(module): index for index, module in enumerate(root.modules())}
    return sorted(layers, key=lambda layer: position[id(layer.module)])


@dataclass
class _Placed:
    """A weight on the device for good, and the signature of the patch that it was made with."""

    signature: Hashable | None
    tensor: torch.Tensor


class Rest:
    """Copies on the device of weights that do not stream. Tied weights stay tied. ``nbytes`` is what they take.
    ``torn``: an ``update`` broke off, so that some have its patches and others those before; the next one mends it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self.torn = False
        self._weights: list[tuple[Slotted, _Placed]] = []

    def place(self, weights: Sequence[Slotted], patches: Patches, after_each: Callable[[], None]) -> None:
        """Copy ``weights`` to the device, patched, and let their modules see the copies, these alone. ``after_each`` is called now
        and then."""
        self.clear()
        placed: dict[int, _Placed] = {}
        plain = self._decoded(weights, patches, after_each)
        for slotted in weights:
            tensor = slotted.tensor
            if id(tensor) not in placed:
                placed[id(tensor)] = _Placed(patches.signature(slotted.path), self._copy(slotted, patches, plain))
                self.nbytes += tensor_bytes(tensor)
                after_each()
            self._weights.append((slotted, placed[id(tensor)]))
        self.bind()

    def update(self, patches: Patches) -> None:
        """Make those copies anew whose patches changed. They are to be unbound while this is done."""
        for slotted, placed in self._weights:
            signature = patches.signature(slotted.path)
            if placed.signature != signature:
                placed.tensor = self._copy(slotted, patches, {})
                placed.signature = signature
                self.torn = True  # should a later one fail
        self.torn = False

    def bind(self) -> None:
        """Let the modules see the copies."""
        for slotted, placed in self._weights:
            slotted.owner[slotted.name] = placed.tensor

    def unbind(self) -> None:
        """Let the modules see their own tensors."""
        for slotted, _ in self._weights:
            slotted.owner[slotted.name] = slotted.tensor

    def clear(self) -> None:
        """Unbind and forget the copies."""
        self.unbind()
        self._weights.clear()
        self.nbytes, self.torn = 0, False

    def tensors(self) -> Iterator[Slotted]:
        """The weights as they are in host memory."""
        for slotted, _ in self._weights:
            yield slotted

    def _decoded(
        self, weights: Sequence[Slotted], patches: Patches, after_each: Callable[[], None]
    ) -> dict[int, torch.Tensor]:
        """By their ids, the plain tensors on the device of those that are kept encoded and not patched."""
        encoded = {
            id(leaf): leaf
            for slotted in weights
            if patches.signature(slotted.path) is None
            for leaf in leaves(slotted.tensor)
            if is_encoded(leaf)
        }
        return decoded_on(self.device, [*encoded.values()], after_each)

    def _copy(self, slotted: Slotted, patches: Patches, plain: Mapping[int, torch.Tensor]) -> torch.Tensor:
        value = slotted.tensor
        if patches.signature(slotted.path) is not None:
            value = patched(slotted.path, slotted.tensor, patches)
        return _on_device(value, slotted.tensor, self.device, plain)


def _on_device(
    value: torch.Tensor, like: torch.Tensor, device: torch.device, plain: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """A copy of ``value`` on ``device``, of the class of ``like`` and a Parameter if that is one. ``plain``: of its encoded
    parts, by their ids, the plain ones that are there already."""
    try:
        _, rebuild = flatten(like, decode=False)
        parts, _ = flatten(value, decode=False)
    except CannotPack:
        moved = value.to(device)
        if isinstance(like, nn.Parameter) and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        return moved
    with torch.inference_mode(False):
        return rebuild(
            [
                (plain[id(part)] if id(part) in plain else part.decode(device))
                if is_encoded(part)
                else part.to(device, copy=True)
                for part in parts
            ]
        )
