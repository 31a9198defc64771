"""BlockSwapWrapperWanVideo where things go wrong: prompts that break off, limits that cannot do, a WanVideoWrapper that is
absent, older than it must be, or on a CPU."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .comfy import ComfyServer, Host, PromptFailed
from .test_wanvideo import WAYS, assert_streamed, attached, by, swap
from .wanvideo import BLOCKS, NAME, Sampler, in_wan_block, node, write_checkpoint
from .workflows import probed, text_to_video

pytestmark = pytest.mark.host


def with_block(scene: dict[str, Any], **disturbance: Any) -> dict[str, Any]:
    """`scene` with a block that is slow or raises, or with `disturbance` empty is well again."""
    return {**scene, "between": [*scene.get("between", ()), in_wan_block(3, **disturbance)]}


def interrupted(sampler: Sampler, kind: str, **scene: Any) -> str:
    """Interrupt a prompt while a block of its second forward sleeps. Returns what the prompt wrote to the log."""
    server = sampler.server
    start = len(server.log_text())
    prompt_id = server.queue(sampler.prompt(kind, **with_block(scene, sleep_seconds=0.4), steps=20))
    server.wait_log("TestWanVideoInBlock: call 2", start=start)
    server.interrupt()
    entry = server.wait(prompt_id, check=False)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    return server.log_text()[start:]


def lines_of_block_swap(log: str) -> list[str]:
    """Lines that this pack wrote."""
    return [line for line in log.splitlines() if re.search("(?<!Initializing )block swap: ", line)]


# -- prompts that break off ---------------------------------------------------------------------------------------------


def assert_without_our_node(sampler: Sampler, kind: str, expected: torch.Tensor, **scene: Any) -> None:
    """The wrapper alone samples as ever with the loaded model that our node had before."""
    sampled = sampler.sample(kind, **scene, probe=True)
    assert torch.equal(sampled.latent, expected)
    assert attached(sampled.log) == []
    assert set(sampled.report["overrides"]) <= {"named_parameters"}


@pytest.mark.parametrize(("kind", "way", "without"), [("plain", "between", True), ("fp8", "set_swap", False)])
def test_after_an_interruption_queue_works_again(sampler: Sampler, kind: str, way: str, without: bool) -> None:
    ours = by(way, swap(kind))
    expected = sampler.reference(kind)
    assert attached(interrupted(sampler, kind, **ours))
    if without:
        assert_without_our_node(sampler, kind, expected, **with_block({}))
    assert_streamed(sampler.sample(kind, **with_block(ours)), expected)


@pytest.mark.parametrize(
    ("kind", "way", "force_offload", "raise_at"),
    [
        ("plain", "between", True, 2),
        ("plain", "set_swap", False, 1),
        ("gguf", "between", False, 2),
        ("fp8", "set_swap", True, 1),
    ],
)
def test_after_an_exception_in_a_block_queue_works_again(
    sampler: Sampler, kind: str, way: str, force_offload: bool, raise_at: int
) -> None:
    ours = by(way, swap(kind))
    expected = sampler.reference(kind)

    def fail() -> None:
        with pytest.raises(PromptFailed, match=f"block 3 raises at call {raise_at}"):
            sampler.sample(kind, **with_block(ours, raise_at=raise_at), force_offload=force_offload)

    fail()
    assert_without_our_node(sampler, kind, expected)
    fail()
    again = sampler.sample(kind, **ours)
    assert torch.equal(again.latent, expected)
    assert attached(again.log)


TEA_CACHE = (
    "WanVideoTeaCache",
    {
        "rel_l1_thresh": 0.2,
        "start_step": 1,
        "end_step": -1,
        "cache_device": "offload_device",
        "use_coefficients": False,
        "mode": "e",
    },
)


@pytest.mark.parametrize("cache", [None, TEA_CACHE], ids=["alone", "with a cache that counts steps"])
@pytest.mark.parametrize(("kind", "way"), [("plain", "between"), ("vace", "set_swap"), ("gguf", "between")])
def test_a_forward_in_which_memory_runs_out_is_repeated_and_the_latent_is_the_same(
    sampler: Sampler, kind: str, way: str, cache: Any
) -> None:
    scene = {"steps": 6, "cache": cache, "cfg": 2.0}
    expected = sampler.reference(kind, **scene)
    sampled = sampler.sample(kind, **with_block(by(way, swap(kind)), memory_at=4), **scene)
    assert torch.equal(sampled.latent, expected)
    assert sampled.log.count("it is repeated with less") == 1
    again = sampler.sample(kind, **with_block(by(way, swap(kind))), **scene)
    assert torch.equal(again.latent, expected)


# -- numbers that cannot do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_more_blocks_than_there_are_is_all_of_them(sampler: Sampler, way: str) -> None:
    patch = swap(block_size_mb=300, blocks_to_swap=999, vace_blocks_to_swap=3)
    sampled = sampler.sample("plain", **by(way, patch))
    run = assert_streamed(sampled, sampler.reference("plain"))
    assert run.streamed == run.units == BLOCKS
    assert sampled.log.count(f"999 blocks are to be streamed, but the model has {BLOCKS}") == 1
    assert sampled.log.count("3 VACE blocks are to be streamed, but the model has 0") == 1


@pytest.mark.parametrize(
    ("way", "wrong", "words"),
    [
        ("between", {"max_vram_gb": 0.001}, "Layerwise mode would do with"),
        ("swap", {"max_vram_gb": 0.001}, "Layerwise mode would do with"),
        ("between", {"blocks_to_swap": 2}, "blocks_to_swap"),
    ],
    ids=["model", "arguments", "blocks that stay"],
)
def test_a_limit_that_is_too_small_is_told_and_a_larger_one_works(
    sampler: Sampler, way: str, wrong: dict[str, Any], words: str
) -> None:
    if sampler.server.host.cuda and "max_vram_gb" not in wrong:
        pytest.skip("a GPU holds the blocks of this model")
    with pytest.raises(PromptFailed, match=rf"smallest limit that holds its weights is [\d.]+ MiB; .* {words}"):
        sampler.sample("plain", **by(way, swap(**wrong)))
    assert_streamed(sampler.sample("plain", **by(way, swap())), sampler.reference("plain"))


@pytest.mark.parametrize(
    "wrong", [{"max_vram_gb": -1}, {"block_size_mb": 0}, {"swap_mode": "fast"}, {"blocks_to_swap": -1}]
)
def test_numbers_that_make_no_sense_are_refused_before_anything_runs(sampler: Sampler, wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptFailed, match=f"ComfyUI rejected the prompt: .*{next(iter(wrong))}"):
        sampler.sample("plain", between=[swap(**wrong)])


def test_a_model_that_is_not_connected_is_told_to_the_user(sampler: Sampler) -> None:
    prompt = sampler.prompt("plain")
    prompt["ours"] = node(swap()[0], **swap()[1])
    prompt["sampler"]["inputs"]["model"] = ["ours", 0]
    start = len(sampler.server.log_text())
    entry = sampler.server.run(prompt)
    assert entry["outputs"] == {}
    log = sampler.server.log_text()[start:]
    assert "told the user: Execution Blocked: Connect a WANVIDEOMODEL to this node" in log


# -- a wrapper that is absent, changed, or on a CPU -----------------------------------------------------------------------


def test_without_the_wrapper_both_nodes_are_there_and_say_what_is_missing(comfy_server: ComfyServer, wan: str) -> None:
    assert "model" in comfy_server.object_info("BlockSwapWrapper")["input"]["required"]
    inputs = {"max_vram_gb": 0.02, "block_size_mb": 1, "swap_mode": "adaptive", "empty_cache_freq": 0}
    streamed = comfy_server.run(text_to_video(wan, between=[("BlockSwapWrapper", inputs)], probe=True))
    assert probed(streamed)["patcher"] == "StreamedModelPatcher"
    start = len(comfy_server.log_text())
    comfy_server.run({"ours": node(swap()[0], **swap()[1]), "sink": node("TestSink", anything=["ours", 1])})
    (line,) = lines_of_block_swap(comfy_server.log_text()[start:])
    assert f"looked for wanvideo.modules.model.WanModel of {NAME}, and it is not loaded" in line


@pytest.fixture(scope="module")
def changed(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """A wrapper that samples as ever but has other names for two things that our node needs, as older ones have."""
    base = tmp_path_factory.mktemp("changed")
    copy = base / "older" / NAME
    leave = shutil.ignore_patterns(".git", "example_workflows", "__pycache__")
    shutil.copytree(wrapper, copy, ignore=leave)
    for file, old, new in (
        ("wanvideo/modules/model.py", "def block_swap(", "def swap_blocks("),
        ("wanvideo/modules/model.py", "self.prefetch_blocks", "self.blocks_ahead"),
        ("utils.py", "transformer.block_swap(", "transformer.swap_blocks("),
        ("nodes_sampler.py", "transformer.prefetch_blocks", "transformer.blocks_ahead"),
    ):
        text = (copy / file).read_text("utf-8")
        assert old in text
        (copy / file).write_text(text.replace(old, new), "utf-8")
    plain = write_checkpoint(base / "models" / "diffusion_models" / "tiny_plain.safetensors")
    with ComfyServer(comfy_host, base, env={"INTELLIGENT_VRAM_FORCE": "1"}, packs=[copy]) as server:
        yield Sampler(server, {"plain": plain.name})


@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_another_wrapper_is_left_to_it_and_the_log_says_what_was_looked_for(
    changed: Sampler, way: str
) -> None:
    expected = changed.sample("plain", probe=True)
    sampled = changed.sample("plain", **by(way, swap()), probe=True)
    assert torch.equal(sampled.latent, expected.latent)
    assert attached(sampled.log) == []
    assert sampled.report["overrides"] == expected.report["overrides"]
    found = lines_of_block_swap(sampled.log)
    assert all("looked for prefetch_blocks, block_swap() in" in line for line in found)
    assert all("as WanVideoWrapper 1.4 has it, and did not find them" in line for line in found)
    assert all(re.search(rf"it is version [\d.]+ of {NAME}", line) for line in found)
    assert len(found) == 1, "\n".join(found)


@pytest.fixture(scope="module")
def on_cpu(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """The wrapper on a CPU, where our nodes do not act."""
    if comfy_host.cuda:
        pytest.skip("this ComfyUI has a GPU")
    base = tmp_path_factory.mktemp("on_cpu")
    plain = write_checkpoint(base / "models" / "diffusion_models" / "tiny_plain.safetensors")
    with ComfyServer(comfy_host, base, packs=[wrapper]) as server:
        yield Sampler(server, {"plain": plain.name})


@pytest.mark.parametrize("way", WAYS)
def test_on_a_cpu_the_wrapper_goes_on_by_itself_and_the_log_says_why(on_cpu: Sampler, way: str) -> None:
    expected = on_cpu.sample("plain").latent
    sampled = on_cpu.sample("plain", **by(way, swap()), probe=True)
    assert torch.equal(sampled.latent, expected)
    assert attached(sampled.log) == []
    (line,) = lines_of_block_swap(sampled.log)
    assert "the model runs on cpu, where there is no device memory to save" in line
    assert ("Swapping" in sampled.log) is (way != "between")
    assert_without_our_node(on_cpu, "plain", expected)
