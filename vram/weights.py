"""The streamed weights of one attached model: encoded or plain, each with a place, packed and page-locked."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .arena import Meanwhile
from .coding import AUTO, OFF, Coding
from .config import SwapConfig
from .discover import Layer
from .host_budget import page_lockable, ram
from .offload import OffloadDevice
from .packing import PackedModel
from .patches import Patches, Progress
from .plan import LayerSize
from .repeat import let_go
from .unit_coding import DoesNotFit
from .worth import Rates

log = logging.getLogger(__name__)

# RAM, as a share of the plain weights: what is made, beside what was packed, which goes before that is packed in its place
ROOM_TO_ENCODE, ROOM_TO_DECODE = 0.75, 1.4


class Weights:
    """Packs ``layers`` for streaming to ``device`` as ``config`` says; ``packed`` is what an earlier packing of them left,
    ``offload`` another card that they are to wait on. ``coding`` says which of them are encoded, ``sizes`` how large they are
    as planning sees them.

    ``whole``: which weights are encoded is what ``packed`` was laid out for. While it is False nothing may be streamed or
    packed; ``lay_out_again`` mends that."""

    def __init__(
        self,
        device: torch.device,
        config: SwapConfig,
        layers: Sequence[Layer],
        packed: PackedModel | None,
        progress: Progress | None,
        offload: OffloadDevice | None,
    ) -> None:
        self.device = device
        self.config = config
        self.layers = layers
        self.packed = packed
        self.offload = offload
        self.coding = packed.coding if packed is not None else Coding(device)
        self.sizes: list[LayerSize] = []
        self.whole = False
        self._progress = progress

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, plain."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def lossless(self) -> str:
        """The user's choice; what lies on another card stays as it is."""
        return self.config.lossless if self.offload is None else OFF

    @property
    def chooses(self) -> bool:
        """Whether it is the engine's to choose by speed if weights are encoded. layerwise mode is for the least memory, and
        decoding takes some."""
        return self.lossless == AUTO and self.config.mode != "layerwise" and self.coding.fast

    def has_room(self, encode: bool) -> bool:
        """Whether there is RAM for weights encoded and plain, while the ones become the others."""
        return page_lockable(*ram()) >= (ROOM_TO_ENCODE if encode else ROOM_TO_DECODE) * self.nbytes

    def decode(self) -> None:
        """Let the weights that were encoded here be plain; to be laid out then."""
        self.whole = False
        self.coding.decode()

    def lay_out(self, lossless: str, rates: Rates | None = None) -> None:
        """Encode or decode weights as ``Coding.prepare`` says, and give each its place: that in ``packed`` if they are still
        the same."""
        self.whole = False
        if lossless == AUTO and self.coding.for_speed and not self.chooses:
            self.coding.decode()
        self.coding.prepare(lossless, self.layers, self.config.host_budget, self._progress, rates)
        if self.packed is not None and not self.packed.renew(self.layers):
            self.packed.close()
            self.packed = None
        if self.packed is None:
            self.packed = PackedModel(self.device, self.layers, self.config.block_size, self.config.host_budget)
            self.packed.coding = self.coding
        self.packed.offload = self.offload
        self.sizes = self.packed.sizes
        self.whole = True

    def lay_out_again(self) -> None:
        """Laying them out broke off: as the configuration says, from the beginning."""
        self.decode()
        self.lay_out(self.lossless)

    def pack(self, patches: Patches, meanwhile: Meanwhile | None = None) -> int:
        """Pack what is laid out, plain if patched weights do not fit encoded, and page-lock it. Returns the bytes written.
        ``meanwhile`` is called while other threads fill memory, and again if packing begins anew. Raises what
        ``PackedModel.pack`` does."""
        try:
            written = self.packed.pack(patches, self._progress, meanwhile)
        except DoesNotFit as reason:
            log.warning("%s; the weights are streamed as they are", reason)
            let_go(reason)  # what was packed before it is in RAM no more
            self.lay_out(OFF)
            written = self.packed.pack(patches, self._progress, meanwhile)
        self.packed.page_lock()
        return written
