"""Whatever is done to an attached model in whatever order, each forward is right and detaching leaves no trace."""

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from intelligent_vram.vram import Patches, SwapConfig, attach
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.plan import MODES
from torch import nn

from .models import build, contents, fingerprint, inputs, smallest_limit, weight_bytes

PATHS = ("blocks.0.qkv.weight", "blocks.3.modulation", "embed.weight", "blocks.2.ffn.2.bias")
AMOUNTS = st.dictionaries(st.sampled_from(PATHS), st.sampled_from((0.25, 0.5)), max_size=3)


class Stop(BaseException):
    pass


class Stopping(nn.Linear):
    def forward(self, x):
        if self.__dict__.get("stop"):
            raise Stop
        return super().forward(x)


def patches_of(amounts):
    return Patches(amounts.get, lambda path, tensor: tensor + amounts[path])


class Life(RuleBasedStateMachine):
    """One model that is attached, run, interrupted, patched, evicted from, starved of memory and detached."""

    swap = packed = None
    dtype, lossless = torch.float32, "off"
    amounts: dict = {}  # noqa: RUF012

    @initialize()
    def load(self):
        self.model = self.make()
        self.before, self.weights = fingerprint(self.model), contents(self.model)

    def make(self):
        model = build("blocks that are skipped", self.dtype).requires_grad_(False)
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Stopping
        return model

    def wanted(self, x, skip):
        plain = self.make()
        for name, weight in plain.named_parameters():
            weight += self.amounts.get(name, 0)
        return plain(x, skip=skip)

    @precondition(lambda self: self.swap is None)
    @rule(
        mode=st.sampled_from(MODES),
        block_size=st.sampled_from((1, 9000, 30_000, 1 << 20)),
        share=st.sampled_from((None, 0, 0.3, 0.7, 2.0)),
        slots=st.sampled_from((None, 2, 4)),
        host_budget=st.sampled_from((None, 0, 100_000)),
        amounts=AMOUNTS,
        again=st.booleans(),
    )
    def attach(self, mode, block_size, share, slots, host_budget, amounts, again):
        settings = {"mode": mode, "block_size": block_size, "slots": slots, "host_budget": host_budget}
        settings["lossless"] = self.lossless
        limit = None
        if share is not None:
            limit = smallest_limit(self.model, **settings) + int(weight_bytes(self.model) * share)
        self.amounts = amounts
        config = SwapConfig(max_vram=limit, **settings)
        self.swap = attach(
            self.model, config, "cpu", patches=patches_of(amounts), packed=self.packed if again else None
        )

    @rule(skip=st.sampled_from(((), (1,), (0, 4), (0, 1, 2, 3, 4))), batch=st.integers(1, 3), times=st.integers(1, 3))
    def run(self, skip, batch, times):
        x = inputs(self.dtype, batch)
        wanted = self.wanted(x, skip)
        for _ in range(times):
            assert torch.equal(self.model(x, skip=skip), wanted)

    @precondition(lambda self: self.swap is not None)
    @rule(block=st.integers(0, 4), layer=st.sampled_from(("qkv", "out")))
    def interrupt(self, block, layer):
        module = getattr(self.model.blocks[block], layer)
        module.__dict__["stop"] = True
        with pytest.raises(Stop):
            self.model(inputs(self.dtype))
        del module.__dict__["stop"]

    @precondition(lambda self: self.swap is not None)
    @rule(first=st.integers(1, 12), count=st.integers(1, 6))
    def starve(self, first, count):
        empty, calls = Link.empty, []

        def failing(link, nbytes):
            calls.append(nbytes)
            if first <= len(calls) < first + count:
                raise torch.OutOfMemoryError("no room")
            return empty(link, nbytes)

        x = inputs(self.dtype, batch=2)
        wanted = self.wanted(x, ())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "empty", failing)
            with contextlib.suppress(torch.OutOfMemoryError):
                assert torch.equal(self.model(x), wanted)

    @precondition(lambda self: self.swap is not None)
    @rule(nbytes=st.sampled_from((1, 20_000, 100_000, 1 << 40)))
    def evict(self, nbytes):
        assert self.swap.evict(nbytes) >= 0

    @precondition(lambda self: self.swap is not None)
    @rule(amounts=AMOUNTS)
    def patch(self, amounts):
        self.amounts = amounts
        self.swap.repack(patches_of(amounts))

    @precondition(lambda self: self.swap is not None)
    @rule()
    def detach(self):
        self.packed = self.take_off()
        self.swap, self.amounts = None, {}
        assert fingerprint(self.model) == self.before
        now = contents(self.model)
        assert all(torch.equal(now[name], weight) for name, weight in self.weights.items())

    def take_off(self):
        return self.swap.detach()

    @invariant()
    def nothing_is_in_use_between_forwards(self):
        if self.swap is not None:
            assert all(unit.active == 0 for unit in self.swap.streamer.units)
            streamed = [unit for unit in self.swap.streamer.units if unit.resident is None]
            assert not any(unit.bound for unit in streamed)

    def teardown(self):
        if self.swap is not None:
            self.detach()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=10, stateful_step_count=12)
