"""BlockSwapWrapper in a real ComfyUI, over its HTTP API: the same latents to the bit, and a model that stays whole."""

import json
import re
from typing import Any

import pytest
import torch

from .checkpoints import HUNYUAN_POOLED_DIM, write_wan
from .comfy import ComfyServer, Host, PromptFailed, cached_nodes
from .workflows import Patch, in_block, lora, probed, saved_latent, text_to_video

pytestmark = pytest.mark.host

MODES = ("adaptive", "chunkwise", "layerwise")
GIB = 1 << 30


def swap(
    mode: str = "adaptive",
    *,
    max_vram_gb: float = 0.02,
    block_size_mb: int = 1,
    empty_cache_freq: int = 0,
    **optional: Any,
) -> Patch:
    """The node under test. A limit of 0.02 GiB holds the 18 MiB of the tiny model's blocks only in part."""
    inputs = {"max_vram_gb": max_vram_gb, "block_size_mb": block_size_mb}
    return "BlockSwapWrapper", {**inputs, "swap_mode": mode, "empty_cache_freq": empty_cache_freq, **optional}


def latent(server: ComfyServer, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The latent of one prompt."""
    return saved_latent(server.run(text_to_video(*args, **kwargs)))


def packed_bytes(log: str) -> list[float]:
    """MiB that each attaching in ``log`` packed."""
    factor = {"B": 1 / (1 << 20), "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
    found = re.findall(r"attached to \w+ in [\d.]+ s: ([\d.]+) (B|KiB|MiB|GiB) packed", log)
    return [float(number) * factor[unit] for number, unit in found]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_vram_gb", [0.0, 0.02])
def test_the_latent_is_the_same_to_the_bit(comfy_server: ComfyServer, wan: str, mode: str, max_vram_gb: float) -> None:
    expected = latent(comfy_server, wan, steps=4, cfg=3.0)
    streamed = latent(comfy_server, wan, steps=4, cfg=3.0, between=[swap(mode, max_vram_gb=max_vram_gb)])
    assert torch.equal(streamed, expected)


def test_the_node_is_described_for_people(comfy_server: ComfyServer) -> None:
    info = comfy_server.object_info("BlockSwapWrapper")
    assert info["description"]
    assert set(info["input"]["required"]) == {
        "model", "max_vram_gb", "block_size_mb", "swap_mode", "empty_cache_freq"
    }  # fmt: skip
    assert all(options[1].get("tooltip") for options in info["input"]["required"].values())
    assert info["input"]["required"]["block_size_mb"][1]["default"] == 300
    assert info["input"]["required"]["swap_mode"][1]["default"] == "adaptive"


@pytest.mark.parametrize("mode", MODES)
def test_models_with_two_lists_of_blocks_stream(
    comfy_server: ComfyServer, hunyuan: str, wan_vace: str, mode: str
) -> None:
    for name, pooled in ((hunyuan, HUNYUAN_POOLED_DIM), (wan_vace, 0)):
        expected = latent(comfy_server, name, pooled_dim=pooled)
        assert torch.equal(latent(comfy_server, name, pooled_dim=pooled, between=[swap(mode)]), expected)


@pytest.mark.parametrize("hand_over", [False, True])
@pytest.mark.parametrize(
    ("mode", "lossless"), [("none", "off"), *((mode, "off") for mode in MODES), ("chunkwise", "on")]
)
def test_a_model_that_is_let_go_is_gone_without_the_garbage_collector(
    comfy_server: ComfyServer, wan: str, wan_lora: str, mode: str, lossless: str, hand_over: bool
) -> None:
    """As without block swap. Else its memory comes back late, or in the middle of the host's own bookkeeping, which expects
    of models that they are there until it lets go of them."""
    prompt = text_to_video(wan)
    inputs = {name: prompt["sampler"]["inputs"][name] for name in ("positive", "negative", "latent_image")}
    settings = {"unet_name": wan, "lora_name": wan_lora, "swap_mode": mode, "lossless": lossless}
    forget = {"class_type": "TestForget", "inputs": {**settings, "hand_over": hand_over, **inputs}}
    wanted = {name: prompt[name] for name in ("positive", "negative", "latent")}
    told = json.loads(comfy_server.run({**wanted, "forget": forget})["outputs"]["forget"]["text"][0])
    assert ("swap" in told["remembered"]) == (mode != "none")
    assert told["alive"] == []


def test_garbage_that_is_collected_at_any_moment_breaks_nothing(
    comfy_server: ComfyServer, hunyuan: str, wan_vace: str, wan: str
) -> None:
    """Models that were let go are in the host's lists until they are collected."""

    def collect(often: bool) -> None:
        comfy_server.run({"collect": {"class_type": "TestCollectOften", "inputs": {"often": often}}})

    models = ((hunyuan, HUNYUAN_POOLED_DIM), (wan_vace, 0), (wan, 0))
    expected = [latent(comfy_server, name, pooled_dim=pooled) for name, pooled in models]
    collect(True)
    try:
        for _ in range(3):
            for (name, pooled), wanted in zip(models, expected, strict=True):
                comfy_server.free(unload_models=False)
                streamed = latent(comfy_server, name, pooled_dim=pooled, between=[swap("layerwise")])
                assert torch.equal(streamed, wanted)
    finally:
        collect(False)


def test_fp8_weights_stream(comfy_server: ComfyServer, wan: str) -> None:
    expected = latent(comfy_server, wan, weight_dtype="fp8_e4m3fn")
    assert torch.equal(latent(comfy_server, wan, weight_dtype="fp8_e4m3fn", between=[swap()]), expected)


def test_loras_before_and_after_the_node_count_once(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    expected = latent(comfy_server, wan, between=[lora(wan_lora, 0.7)])
    twice = latent(comfy_server, wan, between=[lora(wan_lora, 0.7), lora(wan_lora, 0.4)])
    assert not torch.equal(expected, latent(comfy_server, wan))
    for mode in MODES:
        assert torch.equal(latent(comfy_server, wan, between=[lora(wan_lora, 0.7), swap(mode)]), expected)
        assert torch.equal(latent(comfy_server, wan, between=[swap(mode), lora(wan_lora, 0.7)]), expected)
        both = [lora(wan_lora, 0.7), swap(mode), lora(wan_lora, 0.4)]
        assert torch.equal(latent(comfy_server, wan, between=both), twice)


def test_another_lora_strength_packs_only_what_the_lora_touches(
    comfy_server: ComfyServer, wan: str, wan_lora: str
) -> None:
    strengths = (0.3, 0.6, 0.0, 0.9)
    expected = [latent(comfy_server, wan, between=[lora(wan_lora, s)]) for s in strengths]
    comfy_server.free()
    start = len(comfy_server.log_text())
    streamed = [latent(comfy_server, wan, between=[swap(), lora(wan_lora, s)]) for s in strengths]
    assert all(torch.equal(a, b) for a, b in zip(streamed, expected, strict=True))
    first, *others = packed_bytes(comfy_server.log_text()[start:])
    assert first > (8 if comfy_server.host.cuda else 15)  # MiB: a GPU computes in float16
    assert len(others) == len(strengths) - 1
    assert all(0 < size < first / 5 for size in others)


def test_a_model_used_with_and_without_the_node_in_one_graph(
    comfy_server: ComfyServer, wan: str, wan_lora: str
) -> None:
    plain = latent(comfy_server, wan)
    with_lora = latent(comfy_server, wan, between=[lora(wan_lora)])
    prompt = text_to_video(wan, between=[swap()])
    sampler = prompt["sampler"]["inputs"]
    prompt["lora"] = {"class_type": lora(wan_lora)[0], "inputs": {**lora(wan_lora)[1], "model": ["patch0", 0]}}
    prompt["plain sampler"] = {"class_type": "KSampler", "inputs": {**sampler, "model": ["model", 0]}}
    prompt["lora sampler"] = {"class_type": "KSampler", "inputs": {**sampler, "model": ["lora", 0]}}
    for name in ("plain", "lora"):
        inputs = {"samples": [f"{name} sampler", 0], "path": f"{name}.safetensors"}
        prompt[f"save {name}"] = {"class_type": "TestSaveLatent", "inputs": inputs}
    for _ in range(2):
        entry = comfy_server.run(prompt)
        outputs = {name: {"outputs": {"save": entry["outputs"][f"save {name}"]}} for name in ("plain", "lora")}
        assert torch.equal(saved_latent(entry), plain)
        assert torch.equal(saved_latent(outputs["plain"]), plain)
        assert torch.equal(saved_latent(outputs["lora"]), with_lora)
        comfy_server.free()


def test_two_models_take_turns(comfy_server: ComfyServer, wan: str, wan_vace: str) -> None:
    expected = {name: latent(comfy_server, name) for name in (wan, wan_vace)}
    for _ in range(2):
        for name in (wan, wan_vace):
            assert torch.equal(latent(comfy_server, name, between=[swap()], seed=0), expected[name])


def test_a_run_without_change_is_not_run_and_a_new_seed_packs_nothing(comfy_server: ComfyServer, wan: str) -> None:
    expected = latent(comfy_server, wan, seed=7)
    comfy_server.run(text_to_video(wan, between=[swap()], seed=6))
    again = comfy_server.run(text_to_video(wan, between=[swap()], seed=6))
    assert "sampler" in cached_nodes(again)
    start = len(comfy_server.log_text())
    assert torch.equal(latent(comfy_server, wan, between=[swap()], seed=7), expected)
    log = comfy_server.log_text()[start:]
    assert packed_bytes(log) == [], log


def test_after_the_host_unloaded_models_the_next_run_packs_nothing(comfy_server: ComfyServer, wan: str) -> None:
    expected = latent(comfy_server, wan, seed=8)
    comfy_server.run(text_to_video(wan, between=[swap()], seed=5))
    comfy_server.free(unload_models=True, free_memory=False)
    start = len(comfy_server.log_text())
    assert torch.equal(latent(comfy_server, wan, between=[swap()], seed=8), expected)
    assert packed_bytes(comfy_server.log_text()[start:]) == [0.0]


def test_freeing_everything_takes_the_engine_off_and_gives_memory_back(comfy_server: ComfyServer, wan: str) -> None:
    report = probed(comfy_server.run(text_to_video(wan, between=[swap()], probe=True)))
    assert report["patcher"] == "StreamedModelPatcher"
    assert report["loaded_size"] > 0
    assert comfy_server.host.cuda or report["loaded_size"] <= 0.02 * GIB < report["model_size"]
    assert report["forward_overrides"] > 0
    comfy_server.free()
    plain = probed(comfy_server.run(text_to_video(wan, probe=True)))
    assert plain["forward_overrides"] == 0


def test_memory_does_not_grow_over_runs(comfy_server: ComfyServer, wan: str, wan_lora: str) -> None:
    sizes = []
    for run in range(8):
        patches = [swap(MODES[run % 3]), lora(wan_lora, 0.1 * (run % 4))]
        report = probed(comfy_server.run(text_to_video(wan, between=patches, seed=run, probe=True)))
        sizes.append(report["rss"])
    assert sizes[-1] - sizes[3] < 8 << 20


@pytest.mark.parametrize("mode", MODES)
def test_after_an_exception_in_a_block_the_next_run_is_right(comfy_server: ComfyServer, wan: str, mode: str) -> None:
    expected = latent(comfy_server, wan, seed=3)
    with pytest.raises(PromptFailed, match="double_block 3 raises at call 2"):
        comfy_server.run(text_to_video(wan, between=[swap(mode), in_block(3, raise_at=2)], seed=3))
    assert torch.equal(latent(comfy_server, wan, between=[swap(mode)], seed=3), expected)


def test_after_an_interrupt_in_a_block_the_next_run_is_right(comfy_server: ComfyServer, wan: str) -> None:
    expected = latent(comfy_server, wan, seed=4)
    start = len(comfy_server.log_text())
    prompt_id = comfy_server.queue(text_to_video(wan, steps=20, between=[swap(), in_block(2, sleep_seconds=0.3)]))
    comfy_server.wait_log("TestRaiseInBlock: call 2", start=start)
    comfy_server.interrupt()
    entry = comfy_server.wait(prompt_id, check=False)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert torch.equal(latent(comfy_server, wan, between=[swap()], seed=4), expected)


EASY_CACHE: Patch = (
    "EasyCache",
    {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": True},
)
REPEATED = "it is repeated with less"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("others", [(), (EASY_CACHE,)], ids=["alone", "with a cache that counts steps"])
def test_a_step_in_which_memory_runs_out_is_repeated_and_the_latent_is_the_same(
    comfy_server: ComfyServer, wan: str, mode: str, others: tuple[Patch, ...]
) -> None:
    expected = latent(comfy_server, wan, seed=5, steps=6, between=others)
    start = len(comfy_server.log_text())
    patches = [swap(mode), in_block(3, memory_at=4), *others]
    assert torch.equal(latent(comfy_server, wan, seed=5, steps=6, between=patches), expected)
    log = comfy_server.log_text()[start:]
    assert log.count(REPEATED) == 1
    assert "1 of them were repeated" in log
    assert torch.equal(latent(comfy_server, wan, seed=6, between=[swap(mode)]), latent(comfy_server, wan, seed=6))


def test_a_limit_that_cannot_do_is_refused_before_the_first_step(comfy_server: ComfyServer, wan: str) -> None:
    with pytest.raises(PromptFailed, match=r"smallest limit that holds its weights is [\d.]+ MiB"):
        comfy_server.run(text_to_video(wan, between=[swap(max_vram_gb=0.001)], seed=11))
    expected = latent(comfy_server, wan, seed=12)
    assert torch.equal(latent(comfy_server, wan, between=[swap()], seed=12), expected)


@pytest.mark.parametrize("where", ["before", "after"])
def test_torch_compile_of_the_model_works(comfy_server: ComfyServer, wan: str, where: str) -> None:
    """The compiled blocks compute in another order, so that the reference is the compiled model without the node."""
    compiled: Patch = ("TorchCompileModel", {"backend": "inductor"})
    try:
        expected = latent(comfy_server, wan, steps=2, between=[compiled])
    except PromptFailed as error:
        pytest.skip(f"this ComfyUI does not compile the model without the node either: {str(error).splitlines()[0]}")
    patches = [compiled, swap()] if where == "before" else [swap(), compiled]
    streamed = latent(comfy_server, wan, steps=2, between=patches)
    # a GPU computes in float16
    assert (streamed - expected).norm() < (1e-2 if comfy_server.host.cuda else 1e-4) * expected.norm()
    assert comfy_server.host.cuda or torch.allclose(streamed, expected, rtol=1e-3, atol=1e-3)


def test_on_a_cpu_the_model_passes_through_and_the_log_says_why(comfy_host: Host, tmp_path: Any) -> None:
    if comfy_host.cuda:
        pytest.skip("this ComfyUI has a GPU")
    with ComfyServer(comfy_host, tmp_path) as server:
        name = write_wan(server.models / "diffusion_models" / "wan.safetensors").name
        report = probed(server.run(text_to_video(name, between=[swap()], probe=True)))
        assert report["patcher"] == "ModelPatcher"
        assert "is passed through unchanged" in server.log_text()
