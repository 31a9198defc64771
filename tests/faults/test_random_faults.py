"""A thousand seeded faults: each ends in the right result to the bit, or in an error and a whole model, and leaves nothing."""

import copy
import gc
import random
import threading

import psutil
import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.worth import Rates
from torch import nn

from .injection import ERRORS, INJECTED, Faults, disturb, injected, patches, progress

SEEDS = 1000
CHUNK = 100
WIDTH, TOKENS, FORWARDS = 16, 4, 4
RATES = Rates(link=1e9, decoding=1e15, kept=0.67)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x)))) * self.scale


class Model(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def contents(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hung(model):
    """Where everything hangs."""
    return {
        path: (tuple(module.__dict__), [id(tensor) for tensor in module._parameters.values()])
        for path, module in model.named_modules()
    }


def random_faults(dice):
    """One to three kinds of fault, at early calls and late ones, once or for good."""
    at = {}
    for kind in dice.sample(sorted(ERRORS), dice.choice((1, 1, 1, 2, 3))):
        reach = {"allocate": 20, "copy": 60, "event": 300, "compute": 20, "interrupt": 20, "fill": 20, "patch": 8}.get(
            kind, 5
        )
        at[kind] = {dice.randrange(reach): dice.randrange(2) for _ in range(dice.choice((1, 1, 2, 5)))}
    return Faults(at, frozenset(kind for kind in at if dice.random() < 0.15))


class Trial:
    """One model, one swap, a few forwards, and what went wrong."""

    def __init__(self, seed, monkeypatch, device="cpu"):
        self.device = torch.device(device)
        self.dice = dice = random.Random(seed)
        torch.manual_seed(seed)
        self.model = Model(dice.randint(2, 5)).to(dice.choice((torch.float32, torch.bfloat16)))
        self.x = torch.randn(2, TOKENS, WIDTH).to(self.device, self.model.embed.weight.dtype)
        self.faults = random_faults(dice)
        disturb(self.model, self.faults)
        self.monkeypatch = monkeypatch
        self.strength = dice.choice((0.0, 0.0, 0.25))
        self.recodes = self.device.type == "cpu" and dice.random() < 0.3
        self.hung, self.contents = hung(self.model), contents(self.model)
        self.faults.armed = False
        self.wanted = {strength: self.plain(strength) for strength in (0.0, 0.25, 0.5)}
        self.faults.armed = True
        self.errors = []

    def plain(self, strength):
        """What the model gives without the engine."""
        lora = patches(Faults(), strength, "up.weight")
        model = copy.deepcopy(self.model)
        for index, block in enumerate(model.blocks):
            path = f"blocks.{index}.up.weight"
            if lora.signature(path) is not None:
                block.up.weight.copy_(lora.apply(path, self.contents[path]))
        return model.to(self.device)(self.x)

    def config(self):
        dice = self.dice
        weights = sum(tensor.nbytes for tensor in self.model.parameters())
        return SwapConfig(
            mode=dice.choice(MODES),
            block_size=dice.choice((2000, 9000, 40_000)),
            max_vram=dice.choice((None, 60_000 + weights, 60_000 + weights // 2))
            if self.device.type == "cpu"
            else None,
            streamed_blocks=dice.choice((None, None, 1)),
            host_budget=dice.choice((None, None, 0, weights // 2)),
            lossless=dice.choice(("off", "off", "on")) if self.device.type == "cpu" else "off",
        )

    def run(self):
        with injected(self.faults, self.monkeypatch):
            try:
                swap = attach(
                    self.model,
                    self.config(),
                    self.device,
                    patches=patches(self.faults, self.strength, "up.weight"),
                    progress=progress(self.faults),
                )
            except INJECTED as error:
                self.errors.append(error)
                self.whole()
                return
            try:
                self.forwards(swap)
            finally:
                self.faults.armed = self.dice.random() < 0.3  # the device may be lost when the engine is taken off
                swap.detach()
                self.faults.armed = False
            assert swap.device_bytes == 0
            assert swap.streamer.floating_bytes == 0
            self.whole()

    def forwards(self, swap):
        for number in range(FORWARDS):
            if self.strength and number == 2:
                self.repack(swap)
            if self.recodes and number % 2:
                self.recode(swap, RATES if number == 1 else None)
            self.forward(swap)
        self.faults.armed = False
        # what failed before is over: the engine goes on as if nothing had been
        for _ in range(2):
            assert torch.equal(self.model(self.x), self.wanted[self.strength])

    def forward(self, swap):
        try:
            result = self.model(self.x)
        except INJECTED as error:
            self.errors.append(error)
        else:
            assert torch.equal(result, self.wanted[self.strength])
        assert not swap.computing

    def repack(self, swap):
        lora = patches(self.faults, 0.5, "up.weight")
        try:
            swap.repack(lora)
        except INJECTED as error:
            self.errors.append(error)
        else:
            self.strength = 0.5

    def recode(self, swap, rates):
        """As the engine does where encoded weights are faster, or plain ones."""
        try:
            swap.take_other_weights(rates)
        except INJECTED as error:
            self.errors.append(error)

    def whole(self):
        now = contents(self.model)
        assert hung(self.model) == self.hung
        assert all(torch.equal(now[name], tensor) for name, tensor in self.contents.items())
        self.faults.armed = False
        assert torch.equal(copy.deepcopy(self.model).to(self.device)(self.x), self.wanted[0.0])


def left_over():
    """What a trial could have left behind: threads, file handles, device memory."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("intelligent-vram")]
    files = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    return threads, files, torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def run_trials(seeds, monkeypatch, device="cpu"):
    """Run a trial for each seed; an error tells its seed and its faults. Returns the kinds of fault that were reached."""
    kinds = set()
    for seed in seeds:
        trial = Trial(seed, monkeypatch, device)
        try:
            trial.run()
        except BaseException as error:
            told = f"seed {seed}, faults at {trial.faults.at}, for good {set(trial.faults.forever)}"
            raise AssertionError(told) from error
        kinds |= set(trial.faults.hits)
    return kinds


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
@torch.no_grad()
def test_whatever_fails_the_result_is_right_or_the_model_is_whole(first, monkeypatch):
    before = left_over()
    kinds = run_trials(range(first, first + CHUNK), monkeypatch)
    assert left_over() == before
    assert len(kinds) > len(ERRORS) // 2, "the faults are reached"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@torch.no_grad()
def test_on_a_gpu_whatever_fails_the_result_is_right_or_the_model_is_whole(monkeypatch):
    run_trials(range(5), monkeypatch, "cuda")  # libraries allocate once
    before = left_over()
    kinds = run_trials(range(SEEDS, SEEDS + 200), monkeypatch, "cuda")
    assert left_over() == before
    assert len(kinds) > len(ERRORS) // 2, "the faults are reached"
