"""How often the panel is told, and what it is warned of, without a browser and without ComfyUI."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from intelligent_vram.vram import live
from intelligent_vram.vram.config import SwapConfig
from intelligent_vram.vram.hosts import panel
from intelligent_vram.vram.swap import attach

RAM = {"total": 100, "free": 60}
FIGURES = {"seconds": 1.0, "stall": 0.0, "rate": 50.0, "link": 55.0}
DEVICE = {"device": "cuda:0", "host": False, "total": 100, "free": 50, "others": 0, "models": []}


class Model(torch.nn.Module):
    """Blocks that take a while, in which something else may be done."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        time.sleep(0.005)
        self.meanwhile()
        return x


def test_no_more_than_ten_messages_a_second_and_none_after_the_last_one_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "LASTS", 2.0)
    sent: list[float] = []
    watchers = panel.Watchers(lambda *_: sent.append(time.monotonic()))
    swap = attach(Model(), SwapConfig(streamed_blocks=4), "cpu")
    try:
        live.watch(swap, "1")
        watchers.add("client", panel.PANEL)
        end = time.monotonic() + 3
        with torch.no_grad():
            while time.monotonic() < end:
                swap.root(torch.zeros(1, 256))
        assert max(sum(first <= when < first + 1 for when in sent) for first in sent) <= 11
        assert len(sent) > 5
        assert sent[-1] < end - 0.5
        assert watchers._thread is None
    finally:
        swap.detach()


def test_a_run_is_kept_after_its_model_is_gone() -> None:
    swap = attach(Model(), SwapConfig(streamed_blocks=4), "cpu")
    live.watch(swap, "7")
    with torch.no_grad():
        for _ in range(3):
            swap.root(torch.zeros(1, 256))
    assert live.nodes()["7"]["figures"]["forwards"] == 3
    swap.telemetry.records(wait=True)
    live.finished(swap, "prompt")
    swap.detach()
    told = live.state()
    assert not any(model["node"] == "7" for device in told["devices"] for model in device["models"])
    run = told["runs"][0]
    assert (run["prompt"], run["node"], run["figures"]["forwards"]) == ("prompt", "7", 3)
    assert live.nodes()["7"]["running"] is False


@pytest.mark.parametrize(
    ("ram", "device", "model", "expected"),
    [
        ({}, {}, {}, set()),
        ({"free": 5}, {}, {}, {"ram_full"}),
        ({}, {"free": 5}, {}, {"card_full"}),
        ({}, {"others": 30}, {}, {"others"}),
        ({}, {}, {"unlocked": 1}, {"unlocked"}),
        ({}, {}, {"figures": {**FIGURES, "stall": 0.4}}, {"stall"}),
        ({}, {}, {"figures": {**FIGURES, "rate": 20.0}}, {"slow_link"}),
        ({}, {"host": True, "free": 0}, {"figures": {**FIGURES, "rate": 20.0}}, set()),
        ({}, {}, {"figures": None}, set()),
    ],
)
def test_warnings_name_what_matters(ram: dict, device: dict, model: dict, expected: set[str]) -> None:
    models: list[dict[str, Any]] = [{"number": 1, "unlocked": 0, "repeated": 0, "figures": FIGURES, **model}]
    found = live.warnings({**RAM, **ram}, [{**DEVICE, **device, "models": models}])
    assert {warning["what"] for warning in found} == expected


def test_models_on_two_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of the CPU stand for two cards."""
    monkeypatch.setattr("intelligent_vram.vram.swap.resolve", torch.device)
    swaps = [attach(Model(), SwapConfig(streamed_blocks=count), name) for count, name in ((2, "cpu"), (6, "cpu:0"))]
    try:
        for swap, node in zip(swaps, ("1", "2"), strict=True):
            live.watch(swap, node)
        with torch.no_grad():
            swaps[1].root(torch.zeros(1, 256))
        told = live.state()
        assert [device["device"] for device in told["devices"]] == ["cpu", "cpu:0"]
        for device, swap, node in zip(told["devices"], swaps, ("1", "2"), strict=True):
            (model,) = device["models"]
            assert model["node"] == node
            assert model["planned"].count("s") == len(swap.plan.streamed)
            assert device["resident"] == model["resident"] > 0
            assert device["limit"] == swap.limit
        assert [len(device["models"][0]["steps"]) for device in told["devices"]] == [0, 1]
        assert told["ram"]["packed"] == sum(swap.packed.host_bytes for swap in swaps)
        swaps[1].telemetry.records(wait=True)
        live.finished(swaps[1], "prompt")
        assert live.state()["runs"][0]["device"] == "cpu:0"
    finally:
        for swap in swaps:
            swap.detach()


def test_a_node_with_swaps_on_two_devices_shows_the_one_that_computes() -> None:
    swaps = [attach(Model(), SwapConfig(streamed_blocks=count), "cpu") for count in (2, 6)]
    seen: list[dict[str, Any]] = []
    try:
        for swap in swaps:
            live.watch(swap, "9")
            swap.root.meanwhile = lambda: seen.append(live.nodes()["9"])
        with torch.no_grad():
            for swap in (swaps[0], swaps[1], swaps[0]):
                swap.root(torch.zeros(1, 256))
        assert [node["strip"].count("s") for node in seen] == [2, 6, 2]
    finally:
        for swap in swaps:
            swap.detach()


def test_a_step_that_was_repeated_is_warned_of() -> None:
    model = Model()
    swap = attach(model, SwapConfig(streamed_blocks=4), "cpu")
    live.watch(swap, "9")

    errors = [torch.OutOfMemoryError("CUDA out of memory")]

    def fail_once() -> None:
        if errors:
            raise errors.pop()

    model.meanwhile = fail_once
    try:
        with torch.no_grad():
            swap.root(torch.zeros(1, 256))
        told = [warning for warning in live.state()["warnings"] if warning["what"] == "repeated"]
        assert [(warning["device"], warning["count"]) for warning in told] == [("cpu", 1)]
    finally:
        swap.detach()
