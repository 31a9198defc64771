"""Free Memory and Growth Watch in a real ComfyUI, over its HTTP API: what passes stays the same, models are unloaded at that
place in the graph, and growth over runs is found."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from .checkpoints import write_wan
from .comfy import ComfyServer, Host, cached_nodes
from .wanvideo import node
from .workflows import probed, saved_latent, text_to_video

pytestmark = pytest.mark.host

FREE = {"unload_all_models": True, "empty_cache": True, "gc_collect": True, "every_run": False}
LEAK = '''
import torch

class TestLeak:
    """Passes a LATENT on, and keeps so many MiB at each run."""
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "leak", ("LATENT",)
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "mib": ("INT", {"default": 2, "min": 0, "max": 64})}}
    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")
    def leak(self, samples, mib):
        if mib:
            self.kept = [*getattr(self, "kept", ()), torch.zeros(mib, 1024, 256)]
        return (samples,)

NODE_CLASS_MAPPINGS = {"TestLeak": TestLeak}
'''


@pytest.fixture(scope="module")
def server(comfy_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI in which a node can leak."""
    pack = tmp_path_factory.mktemp("packs") / "leak"
    pack.mkdir()
    (pack / "__init__.py").write_text(LEAK)
    with ComfyServer(comfy_host, tmp_path_factory.mktemp("memory"), packs=[pack]) as running:
        write_wan(running.models / "diffusion_models" / "wan.safetensors")
        yield running


def free(source: list[Any], **inputs: Any) -> dict[str, Any]:
    """A Free Memory node behind an output."""
    return node("FreeMemory", **{**FREE, **inputs}, anything=source)


def between(prompt: dict[str, Any], target: str, name: str, **inputs: Any) -> dict[str, Any]:
    """The prompt with a Free Memory node `free` in front of the input ``name`` of node ``target``; its report is told."""
    wired = json.loads(json.dumps(prompt))
    wired["free"] = free(wired[target]["inputs"][name], **inputs)
    wired[target]["inputs"][name] = ["free", 0]
    wired["blank"] = node("EmptyImage", width=16, height=16, batch_size=1, color=0)
    wired["tell"] = node("TestTellReport", text=["free", 1], picture=["blank", 0])
    return wired


def report_of(entry: Mapping[str, Any]) -> str:
    """What Free Memory said in a finished prompt."""
    return entry["outputs"]["tell"]["text"][0]


def watched(label: str, mib: int = 2) -> dict[str, Any]:
    """A leak, with a Growth Watch behind it whose report and picture are told."""
    return {
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "leak": node("TestLeak", samples=["latent", 0], mib=mib),
        "watch": node("GrowthWatchNode", anything=["leak", 0], label=label),
        "tell": node("TestTellReport", text=["watch", 1], picture=["watch", 2]),
        "save": node("TestSaveLatent", samples=["watch", 0], path="watched.safetensors"),
    }


@pytest.mark.parametrize("name", ["FreeMemory", "GrowthWatchNode"])
def test_the_nodes_are_described_for_people(server: ComfyServer, name: str) -> None:
    info = server.object_info(name)
    assert info["description"]
    assert info["display_name"].endswith("(Intelligent VRAM)")
    assert all(options[1].get("tooltip") for options in info["input"]["required"].values())
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])
    assert info["output"][0] == info["input"]["required"]["anything"][0] == "*"


def test_a_latent_and_a_model_pass_unchanged(server: ComfyServer) -> None:
    prompt = text_to_video("wan.safetensors", seed=1)
    expected = saved_latent(server.run(prompt))
    for target, name in (
        ("save", "samples"),
        ("sampler", "model"),
        ("sampler", "positive"),
        ("sampler", "latent_image"),
    ):
        server.free()
        assert torch.equal(saved_latent(server.run(between(prompt, target, name))), expected)


def test_an_image_passes_unchanged(server: ComfyServer) -> None:
    prompt = {"image": node("EmptyImage", width=32, height=16, batch_size=2, color=0x336699)}
    prompt["free"] = free(["image", 0])
    for name, source in (("plain", ["image", 0]), ("passed", ["free", 0])):
        prompt[name] = node("TestTellReport", text=["free", 1], picture=source)
    outputs = server.run(prompt)["outputs"]
    assert outputs["passed"]["text"][1] == outputs["plain"]["text"][1]
    assert json.loads(outputs["passed"]["text"][1])["shape"] == [2, 16, 32, 3]


def test_two_in_a_row_pass_a_model(server: ComfyServer) -> None:
    prompt = text_to_video("wan.safetensors", seed=2)
    expected = saved_latent(server.run(prompt))
    prompt["free"] = free(["model", 0])
    prompt["again"] = free(["free", 0])
    prompt["sampler"]["inputs"]["model"] = ["again", 0]
    assert torch.equal(saved_latent(server.run(prompt)), expected)


def test_models_are_unloaded_at_that_place(server: ComfyServer) -> None:
    server.free()
    prompt = text_to_video("wan.safetensors", seed=3, probe=True)
    assert probed(server.run(prompt))["loaded_size"] > 0
    server.free()
    prompt = between(prompt, "save", "samples")
    prompt["probe"]["inputs"]["trigger"] = ["free", 0]
    entry = server.run(prompt)
    assert probed(entry)["loaded_size"] == 0
    assert re.search(r"^Unloaded: WAN21", report_of(entry))
    assert re.search(r"^RAM of ComfyUI: .* before, .* after \([+-]", report_of(entry), re.MULTILINE)
    assert "[VRAM] Free Memory: Unloaded: WAN21" in server.log_text()
    assert torch.equal(saved_latent(server.run(prompt)), saved_latent(entry))


def test_before_the_sampler_there_is_nothing_to_unload_and_the_sampler_loads(server: ComfyServer) -> None:
    server.free()
    prompt = between(text_to_video("wan.safetensors", seed=4, probe=True), "sampler", "latent_image")
    entry = server.run(prompt)
    assert report_of(entry).startswith("No model was loaded")
    assert probed(entry)["loaded_size"] > 0


def test_what_is_not_chosen_is_not_done(server: ComfyServer) -> None:
    server.free()
    prompt = between(
        text_to_video("wan.safetensors", seed=5, probe=True),
        "save",
        "samples",
        unload_all_models=False,
        empty_cache=False,
        gc_collect=False,
    )
    prompt["probe"]["inputs"]["trigger"] = ["free", 0]
    entry = server.run(prompt)
    assert probed(entry)["loaded_size"] > 0
    assert "nloaded" not in report_of(entry)


@pytest.mark.parametrize("every_run", [False, True])
def test_it_runs_again_only_where_asked(server: ComfyServer, every_run: bool) -> None:
    prompt = between(text_to_video("wan.safetensors", seed=6), "sampler", "latent_image", every_run=every_run)
    server.run(prompt)
    cached = cached_nodes(server.run(prompt))
    assert ("free" in cached, "sampler" in cached) == ((False, False) if every_run else (True, True))
    assert "model" in cached


def test_growth_over_runs_is_told_with_what_grows(server: ComfyServer) -> None:
    entries = [server.run(watched("leaks")) for _ in range(7)]
    reports = [entry["outputs"]["tell"]["text"][0] for entry in entries]
    assert reports[0].startswith("Too few runs to tell: 0 after 1 to warm up")
    assert reports[-1].startswith("Memory grows: Live tensors")
    assert re.search(
        r"Grown: 10\.0 MiB in \+5 tensors \[2, 1024, 256\] float32 on cpu, held by TestLeak\.kept\[\*\]", reports[-1]
    )
    assert entries[-1]["outputs"]["watch"]["text"] == [reports[-1]]
    pictures = [json.loads(entry["outputs"]["tell"]["text"][1]) for entry in entries]
    assert pictures[-1]["shape"][0] == 1
    assert pictures[-1]["shape"][2:] == [1400, 3]
    assert pictures[-1]["shades"] > 8
    assert "[VRAM] Growth Watch, leaks, run 7: Memory grows" in server.log_text()
    assert torch.equal(saved_latent(entries[-1]), torch.zeros(1, 4, 8, 8))


def test_runs_that_keep_nothing_do_not_grow_and_neither_does_the_watch(server: ComfyServer) -> None:
    entries = [server.run(watched("flat", mib=0)) for _ in range(8)]
    assert "Live tensors" not in entries[-1]["outputs"]["tell"]["text"][0].splitlines()[0]
    assert "[2, 1024, 256]" not in entries[-1]["outputs"]["tell"]["text"][0]


def test_each_label_counts_its_own_runs(server: ComfyServer) -> None:
    for label in ("one", "other", "one"):
        server.run(watched(label, mib=0))
    log = server.log_text()
    assert "Growth Watch, one, run 2:" in log
    assert "Growth Watch, other, run 1:" in log
    assert "Growth Watch, other, run 2:" not in log


def test_the_watch_runs_at_the_end_of_a_workflow_even_when_nothing_takes_its_outputs(server: ComfyServer) -> None:
    prompt = text_to_video("wan.safetensors", seed=7)
    prompt["watch"] = node("GrowthWatchNode", anything=["sampler", 0], label="end")
    for _ in range(2):
        entry = server.run(prompt)
    assert "watch" not in cached_nodes(entry)
    assert "sampler" in cached_nodes(entry)
    assert entry["outputs"]["watch"]["text"][0].startswith("Too few runs to tell: 1 after")
