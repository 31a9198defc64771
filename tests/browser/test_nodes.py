"""What our nodes show in the graph, and which of their inputs are greyed out."""

import pytest

from .pages import PLANNER, WRAPPER, Panel, workflow

pytestmark = pytest.mark.host


def greyed(page: Panel, node: str) -> set[str]:
    """Names of the inputs of a node that are greyed out."""
    code = "return app.graph.getNodeById(Number(argument)).widgets.filter((w) => w.disabled).map((w) => w.name)"
    return set(page.script(code, node))


def choose(page: Panel, node: str, name: str, value: object) -> None:
    """Set an input as a user does."""
    page.script(
        "const widget = app.graph.getNodeById(Number(argument[0])).widgets.find((w) => w.name === argument[1]);"
        "widget.value = argument[2]; widget.callback?.(widget.value)",
        [node, name, value],
    )


def test_a_node_shows_the_plan_that_history_tells(page: Panel) -> None:
    page.open(workflow(steps=3, planned=True))
    page.fit("IntelligentVRAMNode")
    _, entry = page.run()
    planned = page.page.locator(".ivram-node[data-state=planned]")
    planned.wait_for(timeout=20_000)
    told = entry["outputs"][PLANNER]["intelligent_vram"][0]
    limit = told["figures"]["limit"] / (1 << 30)
    assert f"/ {limit:.{1 if limit >= 10 else 2}f} GiB" in planned.locator("[data-figure=peakOfLimit]").inner_text()
    cut_off = "parts => parts.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.textContent)"
    assert planned.locator("b, span").evaluate_all(cut_off) == []
    widths = planned.locator(".ivram-node-strip i").evaluate_all("parts => parts.map((p) => Number(p.style.flexGrow))")
    assert sum(widths) == len(told["strip"]) > 0
    page.picture("planned")


def test_inputs_without_effect_are_greyed_out(page: Panel) -> None:
    page.open(workflow(planned=True))
    assert greyed(page, WRAPPER) == set()
    choose(page, WRAPPER, "swap_mode", "layerwise")
    assert greyed(page, WRAPPER) == {"block_size_mb"}
    choose(page, WRAPPER, "swap_mode", "chunkwise")
    assert greyed(page, WRAPPER) == set()

    assert greyed(page, PLANNER) == {"num_cuda_streams", "bandwidth_target"}
    choose(page, PLANNER, "auto_hardware_tuning", False)
    assert greyed(page, PLANNER) == set()
    choose(page, PLANNER, "preset", "standard")
    named = {"auto_hardware_tuning", "vram_threshold_percent", "num_cuda_streams", "bandwidth_target"}
    assert greyed(page, PLANNER) == named
    choose(page, PLANNER, "predict_for", "the last run")
    assert greyed(page, PLANNER) == named | {"width", "height", "num_frames"}


def test_a_connected_plan_takes_the_place_of_the_numbers(page: Panel) -> None:
    page.open(workflow(planned=True))
    connect = (
        "const of = (id) => app.graph.getNodeById(Number(id)); const [from, to] = argument;"
        "of(from).connect(1, of(to), of(to).inputs.findIndex((input) => input.name === 'plan'))"
    )
    page.script(connect, [PLANNER, WRAPPER])
    page.until(lambda: greyed(page, WRAPPER) == {"max_vram_gb", "block_size_mb", "swap_mode"})
    page.script(
        "const node = app.graph.getNodeById(Number(argument));"
        "node.disconnectInput(node.inputs.findIndex((input) => input.name === 'plan'))",
        WRAPPER,
    )
    page.until(lambda: greyed(page, WRAPPER) == set())


def test_what_a_node_shows_is_no_part_of_a_saved_workflow(page: Panel) -> None:
    page.open(workflow())
    saved = page.script("return app.graph.serialize().nodes.find((n) => n.type === 'BlockSwapWrapper').widgets_values")
    assert saved == [0.1, 1, "adaptive", 0, "auto", "cpu"]
    prompt = page.script("return (await app.graphToPrompt()).output")
    assert set(prompt[WRAPPER]["inputs"]) == {
        "model", "max_vram_gb", "block_size_mb", "swap_mode", "empty_cache_freq", "lossless", "offload_device"
    }  # fmt: skip


def test_a_result_is_there_again_after_the_page_was_loaded_anew(page: Panel) -> None:
    page.open(workflow(steps=3))
    page.run()
    again = Panel(page.context, page.server, None)
    again.open(workflow(steps=3))
    again.page.locator(".ivram-node[data-state=lastRun]").wait_for(timeout=20_000)
    assert not again.errors


def search_opened(page: Panel) -> bool:
    """Double click on the canvas, which a page that was just loaded may not take note of; whether one can type then."""
    page.page.mouse.dblclick(800, 520)
    page.page.wait_for_timeout(600)
    box = page.page.locator(".comfy-vue-node-search-container input")
    if box.count():  # an older front end, which does not always give it the focus
        box.first.click()
    return page.script("return document.activeElement.matches('input')")


def test_each_node_is_found_by_search_and_added(page: Panel) -> None:
    """As a user does: double click on the canvas, type what it is called, press Enter."""
    ours = {
        name: info["display_name"]
        for name, info in page.server.get("/object_info").items()
        if info["category"] == "Intelligent VRAM"
    }
    assert len(ours) == 8
    for name, called in ours.items():
        page.script("app.graph.clear()")
        page.until(lambda: search_opened(page))
        page.page.keyboard.type(called.removesuffix(" (Intelligent VRAM)"), delay=5)
        page.until(lambda called=called: called in page.script("return document.body.innerText"))
        page.page.wait_for_timeout(300)
        page.page.keyboard.press("Enter")
        page.page.wait_for_timeout(300)
        page.page.mouse.click(800, 520)  # newer front ends let the node follow the pointer until it is put down
        page.until(lambda name=name: page.script("return app.graph._nodes.map((node) => node.type)") == [name])
        page.page.keyboard.press("Escape")
