"""The panel where models stream to two cards. What it is told of them comes over ComfyUI's own websocket; it is what a real
run told, with the figures of two cards in place of the CPU's."""

from typing import Any

import pytest
from intelligent_vram.vram import live

from .pages import WRAPPER, Panel, workflow

pytestmark = pytest.mark.host

GIB = 1 << 30
NAME = "NVIDIA GeForce RTX 4090"
CARDS = {
    "cuda:0": {"resident": 12 * GIB, "slots": 1 * GIB, "beside": 1 * GIB, "rest": 7 * GIB, "others": 2 * GIB},
    "cuda:1": {"resident": 3 * GIB, "slots": 2 * GIB, "beside": 1 * GIB, "rest": 4 * GIB, "others": 0},
}
LIMITS = {"cuda:0": 22 * GIB, "cuda:1": 12 * GIB}


def card(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """A card of 24 GiB with one model."""
    used = sum(CARDS[name].values())
    about = {"device": name, "name": f"{NAME} ({name})", "host": False, "limit": LIMITS[name], "models": [model]}
    return {**about, **CARDS[name], "total": 24 * GIB, "free": 24 * GIB - used}


def two_cards(told: dict[str, Any]) -> dict[str, Any]:
    """What is told of one model on the CPU as two models on two cards, of which the second waits for its copies."""
    (model,) = told["devices"][0]["models"]
    slow = {**model["figures"], "seconds": 2.0, "stall": 1.0, "rate": 20e9, "link": 55e9}
    fast = {**slow, "seconds": 1.0, "stall": 0.0, "rate": 54e9}
    devices = [
        card("cuda:0", {**model, "number": 101, "figures": fast}),
        card("cuda:1", {**model, "number": 102, "node": None, "figures": slow, "unlocked": GIB}),
    ]
    runs = [{**told["runs"][0], "device": "cuda:1"}]
    return {"ram": told["ram"], "devices": devices, "runs": runs, "warnings": live.warnings(told["ram"], devices)}


def test_each_card_has_its_bar_its_models_and_its_warnings(page: Panel) -> None:
    page.context.route("**/intelligent_vram/watch", lambda route: route.fulfill(json={"seconds": 15}))
    page.open(workflow(steps=3))
    page.run()
    told = two_cards(page.server.get("/intelligent_vram/state")["panel"])
    page.page.locator(".intelligent-vram-tab-button").click()
    parts = page.page.locator(".ivram-device")

    def shown() -> bool:
        page.server.post("/helper_nodes/tell", {"event": "intelligent_vram", "data": {"panel": told}})
        return parts.count() == 2

    page.until(shown)
    for index, (name, uses) in enumerate(CARDS.items()):
        part = parts.nth(index)
        assert part.get_attribute("data-device") == name
        assert part.locator(".ivram-bar-title").inner_text() == f"VRAM, {NAME} ({name})"
        for kind, size in (
            ("resident", uses["resident"] + uses["beside"]),
            ("slots", uses["slots"]),
            ("rest", uses["rest"]),
        ):
            value = part.locator(f"[data-kind={kind}] .ivram-value")
            assert value.get_attribute("data-value") == str(size)
        limit = f"Limit {LIMITS[name] / GIB:.1f} GiB"
        assert limit in part.locator(".ivram-track").get_attribute("aria-label")
        assert part.locator(".ivram-model").count() == 1
    assert f"node {WRAPPER}" in parts.nth(0).locator("h4").inner_text()
    assert parts.nth(0).locator("[data-figure=step]").inner_text() == "1.00 s"
    assert parts.nth(1).locator("[data-figure=step]").inner_text() == "2.00 s"

    warnings = page.page.locator(".ivram-warnings li").all_inner_texts()
    assert any(text.startswith("cuda:0 is 96% full") for text in warnings)
    for words in ("Compute waits", "1.00 GiB of the weights", "Copies run at 36%"):
        assert any(text.startswith(f"cuda:1: {words}") for text in warnings), words
    assert not any("cuda:0: " in text for text in warnings)
    row = page.page.locator(".ivram-history tbody tr").first
    assert ", cuda:1, " in row.get_attribute("title")
    page.picture("two_cards")
