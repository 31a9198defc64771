"""Our nodes where the front end draws nodes as elements of the page ("Nodes 2.0"), a setting of its newer versions."""

from collections.abc import Iterator
from typing import Any

import pytest

from ..host.comfy import ComfyServer
from .pages import NODES_2, NODES_2_SINCE, PLANNER, WRAPPER, Panel, workflow

pytestmark = pytest.mark.host

LABEL = "[data-testid=widget-layout-field-label]"
CANNOT_BE_USED = "input:disabled, [role=switch]:disabled, [role=combobox]:disabled"


@pytest.fixture(autouse=True)
def switched_on(server: ComfyServer) -> Iterator[None]:
    """The setting is on while a test runs."""
    if server.host.version < NODES_2_SINCE:
        pytest.skip("the front end has no Nodes 2.0")
    server.post("/settings", {NODES_2: True})
    yield
    server.post("/settings", {NODES_2: False})


def node(page: Panel, number: str) -> Any:
    """The element of a node."""
    return page.page.locator(f'.lg-node[data-node-id="{number}"]')


def row(page: Panel, number: str, name: str) -> Any:
    """The element of an input of a node."""
    label = page.page.locator(LABEL, has_text=name)
    return node(page, number).locator(".lg-node-widget", has=label)


def greyed(page: Panel, number: str) -> set[str]:
    """Names of the inputs of a node that cannot be used."""
    rows = node(page, number).locator(".lg-node-widget", has=page.page.locator(CANNOT_BE_USED))
    return set(rows.locator(LABEL).all_inner_texts())


def test_a_node_shows_its_last_run_and_keeps_its_size(page: Panel) -> None:
    page.server.free()
    page.open(workflow(steps=3))
    page.fit()
    strip = node(page, WRAPPER).locator(".ivram-node")
    strip.wait_for(timeout=20_000)
    before = node(page, WRAPPER).bounding_box()
    page.run()
    node(page, WRAPPER).locator(".ivram-node[data-state=lastRun]").wait_for(timeout=20_000)
    page.page.wait_for_timeout(300)
    after, inside = node(page, WRAPPER).bounding_box(), strip.bounding_box()
    assert after == before
    assert after["x"] < inside["x"]
    assert inside["x"] + inside["width"] < after["x"] + after["width"]
    assert inside["y"] + inside["height"] < after["y"] + after["height"]
    cut_off = "parts => parts.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.textContent)"
    assert strip.locator("b, span").evaluate_all(cut_off) == []
    page.picture("nodes_2_last_run")


def test_inputs_without_effect_are_greyed_out_as_others_are_chosen(page: Panel) -> None:
    page.open(workflow(planned=True))
    page.fit("IntelligentVRAMNode")
    page.until(lambda: greyed(page, PLANNER) == {"num_cuda_streams", "bandwidth_target"})
    row(page, PLANNER, "auto_hardware_tuning").get_by_role("switch").click()
    page.until(lambda: greyed(page, PLANNER) == set())
    row(page, PLANNER, "preset").get_by_role("combobox").click()
    page.page.get_by_role("option", name="standard").click()
    named = {"auto_hardware_tuning", "vram_threshold_percent", "num_cuda_streams", "bandwidth_target"}
    page.until(lambda: greyed(page, PLANNER) == named)
    page.picture("nodes_2_greyed_out")


def test_every_input_says_what_it_is(page: Panel) -> None:
    page.open(workflow())
    page.fit()
    declared = page.server.object_info("BlockSwapWrapper")["input"]
    told = {name: given[1]["tooltip"] for group in declared.values() for name, given in group.items()}
    labels = node(page, WRAPPER).locator(LABEL)
    names = labels.all_inner_texts()
    last = {"lossless", "offload_device"}
    assert set(names) == {"max_vram_gb", "block_size_mb", "swap_mode", "empty_cache_freq", *last}
    for index, name in enumerate(names):
        labels.nth(index).hover()
        tooltip = page.page.locator("[role=tooltip], .p-tooltip").filter(visible=True)
        page.until(lambda tooltip=tooltip, name=name: told[name] in tooltip.all_inner_texts())
        if name == "max_vram_gb":
            page.page.wait_for_timeout(500)
            page.picture("nodes_2_tooltip")
        page.page.mouse.move(5, 955)
        page.until(lambda tooltip=tooltip: tooltip.count() == 0)


def test_the_setting_can_be_changed_while_results_are_shown(page: Panel) -> None:
    page.open(workflow(steps=3))
    page.fit()
    page.run()
    shown = page.page.locator(".ivram-node[data-state=lastRun]").filter(visible=True)
    for on in (False, True):
        page.set(NODES_2, on)
        page.until(lambda on=on: (node(page, WRAPPER).count() == 1) == on)
        page.until(lambda: shown.count() == 1)
        assert "MiB" in shown.locator("[data-figure=peakOfLimit]").inner_text()
