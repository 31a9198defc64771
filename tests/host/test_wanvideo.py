"""BlockSwapWrapperWanVideo under the real WanVideoWrapper, over ComfyUI's HTTP API: the same latents to the bit, weights
that really stream, and a model that stays whole."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .wanvideo import BLOCKS, VACE_BLOCKS, Sampled, Sampler, node, wrapper_swap
from .workflows import Patch, saved_latent

pytestmark = pytest.mark.host

MODES = ("adaptive", "chunkwise", "layerwise")
KINDS = ("plain", "vace", "fp8", "gguf")
# GiB that hold the weights of the blocks (22 MiB; vace 34; fp8 and gguf 6) only in part
LIMITS = {"plain": 0.011, "vace": 0.016, "fp8": 0.0045, "gguf": 0.0045}
# how our node comes in: between loader and sampler, or by its arguments
WAYS = ("between", "swap", "set_swap")


def swap(kind: str = "plain", mode: str = "adaptive", **inputs: Any) -> Patch:
    """The node under test, with a limit that the blocks of this kind of model do not fit."""
    return "BlockSwapWrapperWanVideo", {
        "max_vram_gb": LIMITS[kind],
        "block_size_mb": 1,
        "swap_mode": mode,
        "empty_cache_freq": 0,
        "blocks_to_swap": 0,
        "vace_blocks_to_swap": 0,
        "offload_img_emb": False,
        "offload_txt_emb": False,
        "block_swap_debug": False,
        **inputs,
    }


def by(way: str, patch: Patch) -> dict[str, Any]:
    """Inputs of `sample_video` that bring in a node by one of WAYS."""
    return {way: [patch] if way == "between" else patch}


@dataclass(frozen=True)
class Run:
    """What the log tells of one run of the engine: its mode, how much it packed, forwards, units streamed at the end."""

    mode: str
    packed: str
    forwards: int
    streamed: int
    units: int


def attached(log: str) -> list[tuple[str, str]]:
    """Mode and packed bytes of each time that the engine was attached in a part of the log."""
    return re.findall(r"block swap \((\w+)\) attached to WanModel in [\d.]+ s: ([\d.]+ \w+) packed", log)


def runs(log: str) -> list[Run]:
    """The runs of the engine that a part of the log tells of, each from its attaching to its report."""
    plan = r"(?:(\d+) of|all) (\d+) units (?:streamed|resident)"
    reports = re.findall(rf"block swap: (\d+) forwards, .* streamed in each, .*; {plan}", log)
    begun = attached(log)
    assert len(begun) == len(reports), log
    return [Run(*begin, *(int(number or 0) for number in end)) for begin, end in zip(begun, reports, strict=True)]


def assert_streamed(sampled: Sampled, expected: torch.Tensor, *, forwards: int = 2, mode: str = "adaptive") -> Run:
    """The latent is the one of the wrapper alone, and the engine streamed each forward of one run."""
    (run,) = runs(sampled.log)
    assert torch.equal(sampled.latent, expected)
    assert (run.mode, run.forwards) == (mode, forwards)
    assert (0 if torch.cuda.is_available() else 1) <= run.streamed <= run.units  # a card holds these models
    return run


# -- five scenes in which weights of moved blocks once were misaligned --------------------------------------------------


@pytest.mark.parametrize("patch", [wrapper_swap(0), swap(max_vram_gb=0.0)], ids=["wrapper", "ours"])
def test_scene_1_block_swap_off(sampler: Sampler, patch: Patch) -> None:
    """blocks_to_swap 0: the wrapper swaps none, our node what the limit asks for, which is none."""
    sampled = sampler.sample("plain", swap=patch, steps=3)
    assert torch.equal(sampled.latent, sampler.reference("plain", steps=3))
    assert [run.streamed for run in runs(sampled.log)] == ([0] if patch[0] == swap()[0] else [])


def test_scene_2_twenty_blocks_by_arguments_for_the_loader(sampler: Sampler) -> None:
    sampled = sampler.sample("plain", swap=swap(max_vram_gb=0.0, block_size_mb=300, blocks_to_swap=20))
    run = assert_streamed(sampled, sampler.reference("plain"))
    assert (run.streamed, run.units) == (20, BLOCKS)


@pytest.mark.parametrize("way", WAYS)
def test_scene_3_vace_blocks(sampler: Sampler, way: str) -> None:
    patch = swap("vace", max_vram_gb=0.0, block_size_mb=300, blocks_to_swap=20, vace_blocks_to_swap=8)
    sampled = sampler.sample("vace", **by(way, patch))
    run = assert_streamed(sampled, sampler.reference("vace"))
    assert (run.streamed, run.units) == (28, BLOCKS + VACE_BLOCKS)


def test_scene_4_fp8_with_block_swap(sampler: Sampler) -> None:
    patch = swap("fp8", max_vram_gb=0.0, block_size_mb=300, blocks_to_swap=20)
    sampled = sampler.sample("fp8", swap=patch, probe=True)
    run = assert_streamed(sampled, sampler.reference("fp8"))
    assert (run.streamed, run.units) == (20, BLOCKS)
    # the wrapper alone would have thrown them away
    assert sampled.report["block_bytes"]["cpu float8_e4m3fn"] > 3 << 20


def test_scene_5_our_node_between_loader_and_sampler(sampler: Sampler) -> None:
    run = assert_streamed(
        sampler.sample("plain", between=[swap()], steps=4), sampler.reference("plain", steps=4), forwards=4
    )
    assert run.streamed < run.units


# -- models and modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["between", "swap"])
def test_every_kind_of_model_streams_and_is_packed_once(sampler: Sampler, kind: str, way: str) -> None:
    expected = [sampler.reference(kind, seed=seed) for seed in (0, 1)]
    packed = []
    for seed in (0, 1):
        run = assert_streamed(sampler.sample(kind, **by(way, swap(kind)), seed=seed), expected[seed])
        assert run.streamed < run.units
        packed.append(run.packed)
    assert packed[0].endswith("MiB")
    assert packed[1] == "0 B"


@pytest.mark.parametrize(("kind", "mode"), [*(("plain", mode) for mode in MODES), ("fp8", "layerwise")])
def test_every_mode_gives_the_same_with_guidance(sampler: Sampler, kind: str, mode: str) -> None:
    sampled = sampler.sample(kind, between=[swap(kind, mode)], cfg=4.0)
    assert_streamed(sampled, sampler.reference(kind, cfg=4.0), forwards=4, mode=mode)


@pytest.mark.parametrize(
    ("quantization", "way"),
    [("fp8_e4m3fn", "between"), ("fp8_e4m3fn_fast", "between"), ("fp8_e4m3fn_fast", "swap"), ("fp8_e5m2", "swap")],
)
def test_weights_that_the_loader_makes_fp8_stream(sampler: Sampler, quantization: str, way: str) -> None:
    """`_fast` multiplies in FP8 (torch._scaled_mm), which takes weights that are contiguous and aligned only."""
    scene = {"quantization": quantization, "base_precision": "bf16"}
    expected = sampler.reference("plain", **scene)
    assert expected.isfinite().all()
    sampled = sampler.sample("plain", **by(way, swap("fp8")), **scene, probe=True)
    assert_streamed(sampled, expected)
    assert sampled.report["block_bytes"][f"cpu float8_{quantization.split('_')[1]}"] > 3 << 20


def test_vace_blocks_that_are_not_used_do_not_get_in_the_way(sampler: Sampler) -> None:
    for vace in (False, True):
        assert_streamed(sampler.sample("vace", between=[swap("vace")], vace=vace), sampler.reference("vace", vace=vace))


def test_the_node_is_described_for_people(sampler: Sampler) -> None:
    info = sampler.server.object_info("BlockSwapWrapperWanVideo")
    assert info["description"]
    assert info["output"] == ["WANVIDEOMODEL", "BLOCKSWAPARGS"]
    assert set(info["input"]["required"]) == set(swap()[1])
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    assert all(options[1].get("tooltip") for options in inputs.values())
    ours, own = (sampler.server.object_info(name) for name in ("BlockSwapWrapperWanVideo", "WanVideoBlockSwap"))
    own_inputs = {**own["input"]["required"], **own["input"]["optional"]}
    shared = set(own_inputs) & set(ours["input"]["required"])
    assert shared == {
        "blocks_to_swap", "vace_blocks_to_swap", "offload_img_emb", "offload_txt_emb", "block_swap_debug"
    }  # fmt: skip
    assert all(own_inputs[name][0] == ours["input"]["required"][name][0] for name in shared)


# -- LoRAs --------------------------------------------------------------------------------------------------------------


def lora_select(sampler: Sampler) -> dict[str, Any]:
    return node("WanVideoLoraSelect", lora=sampler.models["lora"], strength=0.7, merge_loras=False)


@pytest.mark.parametrize(
    ("kind", "how", "way"),
    [
        ("plain", "merged", "between"),
        ("plain", "unmerged", "swap"),
        ("plain", "set", "set_swap"),
        ("fp8", "unmerged", "between"),
        ("gguf", "unmerged", "swap"),
        ("gguf", "set", "between"),
    ],
)
def test_loras_before_our_node_count(sampler: Sampler, kind: str, how: str, way: str) -> None:
    """LoRAs of the loader, merged by it or not, and such as WanVideoSetLoRAs sets."""
    loras = [(sampler.models["lora"], 0.7)]
    scene: dict[str, Any] = {"loras": loras, "merge_loras": how == "merged", "set_loras": how == "set"}
    expected = sampler.reference(kind, **scene)
    assert not torch.equal(expected, sampler.reference(kind))
    for _ in range(2):
        assert_streamed(sampler.sample(kind, **by(way, swap(kind)), **scene), expected)


@pytest.mark.parametrize("kind", ["plain", "fp8", "gguf"])
def test_loras_after_our_node_count(sampler: Sampler, kind: str) -> None:
    scene: dict[str, Any] = {"loras": [(sampler.models["lora"], 0.7)], "merge_loras": False, "set_loras": True}
    between = [swap(kind), ("WanVideoSetLoRAs", {"lora": ["lora", 0]})]
    sampled = sampler.sample(kind, between=between, extra={"lora": lora_select(sampler)})
    assert_streamed(sampled, sampler.reference(kind, **scene))


def test_a_lora_that_is_gone_leaves_nothing_behind(sampler: Sampler) -> None:
    loras = {"loras": [(sampler.models["lora"], 0.7)], "merge_loras": False, "set_loras": True}
    for scene in (loras, {}, loras, {}):
        assert_streamed(sampler.sample("plain", between=[swap()], **scene), sampler.reference("plain", **scene))


# -- what the sampler and the node can be told --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["between", "set_swap"])
def test_a_model_that_is_not_offloaded_streams_in_the_next_run_too(sampler: Sampler, way: str) -> None:
    expected = [sampler.reference("plain", seed=seed) for seed in (0, 1)]
    packed = []
    for count, force_offload in enumerate((True, False, False, True)):
        sampled = sampler.sample("plain", **by(way, swap()), seed=count % 2, force_offload=force_offload, probe=True)
        assert torch.equal(sampled.latent, expected[count % 2])
        # the engine is still there, or gone with the sampler
        assert (sampled.report["overrides"]["_apply"] > BLOCKS) is not force_offload
        packed += [size for _, size in attached(sampled.log)]
    assert len(packed) == 4
    assert packed[1:] == ["0 B"] * 3


@pytest.mark.parametrize(("kind", "way"), [("plain", "between"), ("plain", "swap"), ("fp8", "set_swap")])
def test_embeddings_can_stay_in_ram_and_each_forward_be_told(sampler: Sampler, kind: str, way: str) -> None:
    patch = swap(kind, offload_txt_emb=True, offload_img_emb=True, block_swap_debug=True)
    sampled = sampler.sample(kind, **by(way, patch), steps=3)
    assert_streamed(sampled, sampler.reference(kind, steps=3), forwards=3)
    told = re.findall(r"block swap: forward (\d+): [\d.]+ ms, .* streamed", sampled.log)
    assert told == ["0", "1", "2"]
    assert "block swap: forward" not in sampler.sample(kind, **by(way, swap(kind))).log


def test_a_loaded_model_with_our_node_and_without_in_one_graph(sampler: Sampler) -> None:
    expected = sampler.reference("plain")
    for force_offload in (True, False):
        prompt = sampler.prompt("plain", between=[swap()], force_offload=force_offload)
        prompt["plain sampler"] = node("WanVideoSampler", **{**prompt["sampler"]["inputs"], "model": ["model", 0]})
        prompt["plain save"] = node("TestSaveLatent", samples=["plain sampler", 0], path="plain.safetensors")
        start = len(sampler.server.log_text())
        outputs = sampler.server.run(prompt)["outputs"]
        for name in ("save", "plain save"):
            assert torch.equal(saved_latent({"outputs": {"save": outputs[name]}}), expected)
        assert len(attached(sampler.server.log_text()[start:])) == 1


def test_two_experts_take_turns_over_many_prompts_in_the_same_memory(sampler: Sampler) -> None:
    experts: dict[str, Any] = {"low_noise_model": "low", "steps": 2}
    expected = [sampler.reference("plain", **experts, seed=seed) for seed in (0, 1)]
    sizes = []
    for count in range(9):
        patch = by(("between", "set_swap")[count % 2], swap(mode=MODES[count % 3]))
        sampled = sampler.sample("plain", **experts, **patch, seed=count % 2, probe=True)
        assert torch.equal(sampled.latent, expected[count % 2])
        high, low = runs(sampled.log)
        assert high.forwards == low.forwards == 1
        assert high.streamed * low.streamed > 0
        assert (high.packed == low.packed == "0 B") is (count > 0)
        sizes.append(sampled.report["rss"])
    # what a prompt leaves behind comes and goes with the collection of garbage; the blocks of one expert are 22 MiB
    assert min(sizes[6:]) - min(sizes[3:6]) < 8 << 20, sizes


# -- beside the wrapper's own block swap ----------------------------------------------------------------------------------


def own_set() -> tuple[Patch, Mapping[str, Any]]:
    """A WanVideoSetBlockSwap for `between`, and for `extra` the node that makes its arguments."""
    own = wrapper_swap(10)
    return ("WanVideoSetBlockSwap", {"block_swap_args": ["own", 0]}), {"own": node(own[0], **own[1])}


@pytest.mark.parametrize("order", ["loader first", "set first", "set last", "both"])
def test_our_node_wins_over_the_wrappers_and_the_log_says_so_once(sampler: Sampler, order: str) -> None:
    last, extra = own_set()
    scenes: dict[str, dict[str, Any]] = {
        "loader first": {"swap": wrapper_swap(10), "between": [swap()]},
        "set first": {"set_swap": wrapper_swap(10), "between": [swap()]},
        "set last": {"between": [swap(), last], "extra": extra},
        "both": {"set_swap": wrapper_swap(10), "between": [swap(), last], "extra": extra},
    }
    sampled = sampler.sample("plain", **scenes[order])
    assert_streamed(sampled, sampler.reference("plain"))
    before = sampled.log.count("those of this pack replace them")
    after = sampled.log.count("the block swap of this pack, which stays in charge")
    assert (before, after) == {"loader first": (1, 0), "set first": (1, 0), "set last": (0, 1), "both": (1, 1)}[order]
    assert "Swapping" not in sampled.log


def test_the_wrappers_own_arguments_set_behind_a_loader_with_ours_are_the_wrappers(sampler: Sampler) -> None:
    """Without our node behind the loader nothing of ours is there to see what comes later."""
    sampled = sampler.sample("plain", swap=swap(), set_swap=wrapper_swap(10))
    assert torch.equal(sampled.latent, sampler.reference("plain"))
    assert attached(sampled.log) == []
    assert "Swapping 9 transformer blocks" in sampled.log


@pytest.mark.parametrize(
    ("kind", "way", "own"),
    [
        ("plain", "between", {}),
        ("fp8", "set_swap", {"set_swap": wrapper_swap(10)}),
        ("gguf", "between", {}),
    ],
    ids=["plain", "fp8", "gguf"],
)
def test_a_run_without_our_node_finds_the_model_as_the_wrapper_made_it(
    sampler: Sampler, kind: str, way: str, own: Mapping[str, Any]
) -> None:
    """The same loaded model in turns, with our node and without."""
    expected = sampler.reference(kind)
    sampler.server.free()
    first = sampler.sample(kind, **own, probe=True)
    assert torch.equal(first.latent, expected)
    for force_offload in (True, False):
        ours = sampler.sample(kind, **by(way, swap(kind)), probe=True, force_offload=force_offload)
        assert torch.equal(ours.latent, expected)
        assert attached(ours.log)
        without = sampler.sample(kind, **own, probe=True)
        assert torch.equal(without.latent, expected)
        assert attached(without.log) == []
        same = ("hooks", "linear", "patcher", "patched_linear", "block_bytes", "parameter_bytes", "state_dict")
        assert {name: without.report[name] for name in same} == {name: first.report[name] for name in same}
        # this one stays on, for the next run with our node
        assert without.report["overrides"] == {**first.report["overrides"], "named_parameters": 1}
    sampler.server.free()
    assert "named_parameters" not in sampler.sample(kind, probe=True).report["class_overrides"]
