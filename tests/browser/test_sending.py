"""How often the panel is told, and what it is warned of, without a browser and without ComfyUI."""

import time
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
    """Blocks that take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        time.sleep(0.005)
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
    models: list[dict[str, Any]] = [{"number": 1, "unlocked": 0, "figures": FIGURES, **model}]
    found = live.warnings({**RAM, **ram}, [{**DEVICE, **device, "models": models}])
    assert {warning["what"] for warning in found} == expected
