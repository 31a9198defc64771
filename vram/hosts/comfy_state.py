"""What block swap keeps on a model of ComfyUI's, and how it talks to the host while packing."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..gates import InstancePatches
from ..packing import PackedModel
from ..swap import Swap


class State:
    """What block swap keeps on the module that patchers share: the swap and its owner, or the packed weights for the next."""

    def __init__(self) -> None:
        self.swap: Swap | None = None
        self.owner: int | None = None
        self.key: Hashable = None
        self.packed: PackedModel | None = None
        self.reported = 0
        self.backup: dict[str, Any] = {}
        self._handed_over = InstancePatches()

    def suspend(self) -> None:
        """Take the swap off, whoever attached it: the module is whole, on the host, unpatched."""
        self.take_back()
        swap, self.swap, self.owner, self.key = self.swap, None, None, None
        if swap is not None:
            self.packed = swap.detach(keep_encoded=True)
            self.backup.clear()

    def lay_bare(self) -> None:
        """Take the swap off and decode what it encoded: the host is about to read the weights in its own way."""
        self.suspend()
        if self.packed is not None and self.packed.coding.decode():
            self.packed = None

    def hand_over(self, model: torch.nn.Module) -> None:
        """The host lets go of a patcher because it, or another copy of it, is about to be loaded. The swap stays on for
        the case that it is the same one; a patcher that loads weights in the host's way first walks over the modules, or
        moves them, and finds the swap gone."""

        def first(method: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.lay_bare()
                return getattr(model, method)(*args, **kwargs)

            return call

        self.take_back()
        for method in ("named_modules", "_apply"):
            self._handed_over.set(model, method, first(method))

    def take_back(self) -> None:
        """Undo ``hand_over``."""
        self._handed_over.restore()


class PatchIdentity:
    """A patch of the host in a signature: equal when strength, offset and the adapter object are the same."""

    __slots__ = ("identity", "patch")

    def __init__(self, patch: tuple) -> None:
        self.patch = patch
        self.identity = tuple(value if isinstance(value, int | float | str) else id(value) for value in patch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatchIdentity) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


class HostProgress:
    """The host's progress bar while weights are packed; an interruption of the prompt ends the packing."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)
