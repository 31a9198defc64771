"""Whether a model's forwards are shorter with its weights encoded, from one that was measured.

A forward lasts as long as its copies or as its compute, whichever is longer. Encoded weights shorten the copies; decoding
them is work for the same processors that compute, so that it lengthens compute by all the time that it takes
(benchmarks/README.md has what it took).
"""

from __future__ import annotations

from dataclasses import dataclass

from .telemetry import ForwardRecord

GAIN = 0.03  # share of a forward that has to be saved for weights to be encoded
LOSS = 0.01  # share of a forward that decoding has to cost for them to be decoded again
PAYBACK = 150  # forwards in which the time that encoding takes has to be saved
ENCODING = 3e9  # bytes per second, about the least that was measured


@dataclass(frozen=True)
class Rates:
    """Measured on this machine, in bytes per second: of page-locked copies to the device, and of plain bytes decoded there.
    ``kept``: the share of its bytes that a weight has encoded."""

    link: float
    decoding: float
    kept: float

    def pays(self, plain: int, encoded: int) -> bool:
        """Whether fewer bytes on the link save more time than decoding takes."""
        return (plain - encoded) / self.link > plain / self.decoding

    def shorten(self, record: ForwardRecord, weights: int) -> bool:
        """Whether a forward like ``record``, whose weights crossed the link plain, would be so much shorter that it is worth
        encoding all ``weights`` bytes of the model."""
        copying = self.kept * record.copying
        computing = record.compute + record.streamed_bytes / self.decoding
        saved = record.seconds - max(copying, computing)
        return saved > GAIN * record.seconds and saved * PAYBACK > weights / ENCODING


def waits_for_copies(record: ForwardRecord) -> bool:
    """Whether so much of a forward is waiting for copies that fewer bytes could matter."""
    return record.stall > GAIN * record.seconds


def plain_is_shorter(record: ForwardRecord) -> bool:
    """Whether a forward like ``record``, some of whose weights crossed the link encoded, would be shorter with plain ones."""
    if not record.encoded_bytes:
        return False
    plain = record.streamed_bytes - record.encoded_bytes + record.decoded_bytes
    copying = record.copying * plain / record.streamed_bytes
    computing = record.compute - record.decode_seconds
    return max(copying, computing) < (1 - LOSS) * record.seconds
