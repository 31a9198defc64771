"""The live panel in a real browser, on the front ends of the present and of the oldest ComfyUI."""

import re
from collections import Counter

import pytest

from .pages import WRAPPER, Panel, workflow

pytestmark = pytest.mark.host

MIB = 1 << 20


def seconds(text: str) -> float:
    """Of a text such as "1.25 s" or "930 ms"."""
    number, unit = text.split()[:2]
    return float(number) / (1000 if unit == "ms" else 1)


def test_before_any_run_the_panel_says_what_to_do(page: Panel) -> None:
    page.server.free()
    page.open(workflow())
    page.fit()
    page.show()
    page.until(lambda: "Block Swap Wrapper" in page.text(".ivram-empty"))
    assert "RAM" in page.text(".ivram-panel")
    page.picture("empty")


def test_figures_move_while_a_prompt_runs_and_agree_with_history_and_log(page: Panel) -> None:
    page.open(workflow(steps=60))
    page.fit()
    page.show()
    start = len(page.server.log_text())
    prompt = page.queue()
    page.until(lambda: page.page.locator(".ivram-panel[data-state=live]").count(), timeout=60)
    page.until(lambda: page.page.locator(".ivram-columns i").count() > 6, timeout=60)
    page.picture("sampling")
    page.server.wait(prompt)
    row = page.page.locator(f'.ivram-history tr[data-prompt="{prompt}"]')
    row.wait_for(timeout=20_000)

    states = [state for _, state in page.told("panel")]
    models = [model for state in states for device in state["devices"] for model in device["models"]]
    assert len({model["forwards"] for model in models}) > 3, "steps are counted"
    assert len({model["strip"] for model in models}) > 2, "the strip moves"
    assert any("x" in model["strip"] for model in models), "it shows what computes"
    assert {model["node"] for model in models} == {WRAPPER}

    page.server.wait_log(" forwards, median", start=start)
    line = r"block swap: (\d+) forwards, median (\d+) ms, of which (\d+) ms waited"
    count, middle, stall = re.search(line, page.server.log_text()[start:]).groups()
    run = states[-1]["runs"][0]
    assert run["prompt"] == prompt
    assert run["figures"]["forwards"] == int(count) == 60
    assert run["figures"]["seconds"] * 1000 == pytest.approx(int(middle), abs=0.51)
    assert run["figures"]["stall"] * 1000 == pytest.approx(int(stall), abs=0.51)
    assert seconds(row.locator("td").first.inner_text()) * 1000 == pytest.approx(int(middle), abs=10)
    page.until(lambda: page.text(".ivram-status") == "Idle")
    page.picture("done")

    node = page.page.locator(".ivram-node").first
    page.until(lambda: node.get_attribute("data-state") == "lastRun")
    peak = run["figures"]["peak"] / MIB
    assert (
        node.locator("[data-figure=peakOfLimit]")
        .inner_text()
        .startswith(f"{peak:.{0 if peak >= 100 else 1}f} / 102 MiB")
    )


def test_times_in_history_fit_into_the_prompts_own(page: Panel) -> None:
    page.open(workflow(steps=6))
    page.show()
    prompt, entry = page.run()
    times = {name: data["timestamp"] for name, data in entry["status"]["messages"] if "timestamp" in data}
    page.page.locator(f'tr[data-prompt="{prompt}"]').wait_for(timeout=20_000)
    run = page.server.get("/intelligent_vram/state")["panel"]["runs"][0]
    taken = (times["execution_success"] - times["execution_start"]) / 1000
    assert run["prompt"] == prompt
    assert 0 < run["figures"]["forwards"] * run["figures"]["seconds"] < 1.5 * taken
    assert times["execution_start"] / 1000 <= run["when"] <= times["execution_success"] / 1000 + 0.1


def test_at_most_ten_messages_a_second_and_none_while_nobody_looks(page: Panel) -> None:
    page.open(workflow(steps=20))
    page.show()
    page.run()
    times = page.until(lambda: [when for when, _ in page.told("panel")])
    assert len(times) / (1 + times[-1] - times[0]) <= 10
    page.page.locator(".intelligent-vram-tab-button").click()
    page.page.wait_for_selector(".ivram-panel", state="hidden")
    page.page.wait_for_timeout(1500)
    page.forget()
    page.run()
    assert not page.told("panel")


def test_a_run_without_our_nodes_leaves_the_panel_friendly(page: Panel) -> None:
    page.server.free()
    page.open(workflow(steps=3, swapped=False))
    page.show()
    page.run()
    page.until(lambda: page.page.locator(".ivram-empty").is_visible())
    assert page.text(".ivram-status") == "Idle"


def test_every_tab_of_the_browser_is_told(page: Panel) -> None:
    other = Panel(page.context, page.server, None)
    page.open(workflow(steps=10))
    for tab in (page, other):
        tab.show()
    prompt, _ = page.run()
    for tab in (page, other):
        tab.page.locator(f'tr[data-prompt="{prompt}"]').wait_for(timeout=20_000)
        assert tab.told("panel")
    assert not other.errors


def test_a_closed_websocket_is_said_and_taken_up_again(page: Panel) -> None:
    page.open(workflow(steps=6))
    page.show()
    page.script(
        "const api = window.comfyAPI.api.api; window.seen = [];"
        "const part = document.querySelector('.ivram-panel');"
        "new MutationObserver(() => window.seen.push(part.dataset.state)).observe(part, {attributes: true});"
        "api.socket.close()"
    )
    page.until(lambda: "lost" in page.script("return window.seen"), timeout=20)
    page.until(lambda: page.page.locator(".ivram-panel:not([data-state=lost])").count(), timeout=30)
    page.forget()
    prompt, _ = page.run()
    page.page.locator(f'tr[data-prompt="{prompt}"]').wait_for(timeout=20_000)
    assert page.told("panel")


def test_theme_and_language_follow_the_front_end(page: Panel) -> None:
    page.open(workflow(steps=8))
    page.fit()
    page.show()
    page.run()
    panel = page.page.locator(".ivram-panel")
    colour = "getComputedStyle(document.querySelector('.ivram-panel')).color"
    dark = page.script(f"return {colour}")
    page.set("Comfy.ColorPalette", "light")
    page.until(lambda: page.script(f"return {colour}") != dark)
    page.page.wait_for_timeout(500)
    page.picture("light")
    page.set("Comfy.Locale", "zh")
    page.until(lambda: "最近的运行" in panel.inner_text())
    page.page.wait_for_timeout(500)
    page.picture("chinese")
    page.set("Comfy.Locale", "en")
    page.until(lambda: "Last runs" in panel.inner_text())


def test_the_panel_fits_a_narrow_sidebar(page: Panel) -> None:
    page.open(workflow(steps=4))
    page.show()
    page.run()
    page.until(lambda: page.text(".ivram-history"))
    page.script("document.querySelector('.ivram-panel').style.width = '200px'")
    wide = page.script(
        "const part = document.querySelector('.ivram-panel');"
        "return [...part.querySelectorAll('*')].filter((e) => !e.closest('.ivram-history') && "
        "e.getBoundingClientRect().right > part.getBoundingClientRect().right + 1).map((e) => e.className)"
    )
    assert not wide


def test_the_panel_can_be_used_by_keyboard_and_is_named_for_screen_readers(page: Panel) -> None:
    page.open(workflow(steps=4))
    page.show()
    page.run()
    page.until(lambda: page.page.locator(".ivram-model").count())
    page.page.locator(".ivram-button").first.focus()
    page.page.keyboard.press("Enter")
    assert page.script("return Object.keys(app.canvas.selected_nodes ?? {}).length") == 1
    page.page.keyboard.press("Tab")
    assert "ivram-history" in page.script("return document.activeElement.className")
    images = page.page.locator(".ivram-panel [role=img]")
    labels = [images.nth(index).get_attribute("aria-label") for index in range(images.count())]
    assert all(labels)
    assert Counter(label.split(":")[0] for label in labels)["RAM"] == 1
    assert page.page.locator(".ivram-status[aria-live=polite]").count() == 1


def test_settings_change_units_and_take_the_panel_away(page: Panel) -> None:
    page.show()
    assert "GiB" in page.text(".ivram-panel")
    page.set("IntelligentVRAM.Units", "GB")
    page.until(lambda: " GB" in page.text(".ivram-panel"))
    page.set("IntelligentVRAM.Units", "GiB")
    page.set("IntelligentVRAM.Panel", False)
    page.page.wait_for_selector(".intelligent-vram-tab-button", state="detached")
    page.set("IntelligentVRAM.Panel", True)
    page.page.wait_for_selector(".intelligent-vram-tab-button")


def test_routes_refuse_what_they_do_not_know(page: Panel) -> None:
    ask = (
        "return (await window.comfyAPI.api.api.fetchApi('/intelligent_vram/watch', {method: 'POST', body: argument,"
        " headers: {'Content-Type': 'application/json'}})).status"
    )
    for body, status in (("[]", 400), ("{", 400), ('{"client": 1, "what": "panel"}', 400)):
        assert page.script(ask, body) == status
    assert page.script(ask, '{"client": "nobody", "what": "panel"}') == 404
    assert page.script(ask, '{"client": "nobody", "what": "secrets"}') == 400
    page.errors.clear()


def test_nodes_are_told_about_once_a_second(page: Panel) -> None:
    page.open(workflow(steps=20))
    page.page.wait_for_timeout(1500)
    page.forget()
    page.run()
    times = page.until(lambda: [when for when, _ in page.told("nodes")])
    assert len(times) <= 2 + 1.5 * (times[-1] - times[0])
