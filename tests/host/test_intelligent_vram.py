"""IntelligentVRAMNode in a real ComfyUI, over its HTTP API: the same latents to the bit with its defaults alone, and a
report and a picture that tell what there is and what will happen."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .checkpoints import HUNYUAN_POOLED_DIM, write_wan
from .comfy import ComfyServer, PromptFailed, cached_nodes
from .test_wanvideo import assert_streamed, runs
from .test_wanvideo import swap as wanvideo_swap
from .wanvideo import BLOCKS, VACE_BLOCKS, Sampler, node
from .workflows import Patch, saved_latent, text_to_video

pytestmark = pytest.mark.host

NODE = "IntelligentVRAMNode"
DEFAULTS: dict[str, Any] = {
    "preset": "custom",
    "auto_hardware_tuning": True,
    "vram_threshold_percent": 50.0,
    "blocks_to_swap": 0,
    "enable_cuda_optimization": True,
    "enable_dram_optimization": True,
    "num_cuda_streams": 8,
    "bandwidth_target": 0.8,
    "offload_txt_emb": False,
    "offload_img_emb": False,
    "vace_blocks_to_swap": 0,
    "debug_mode": False,
    "predict_for": "the size below",
    "width": 832,
    "height": 480,
    "num_frames": 81,
    "model_name": "(the connected model)",
}
RANGES = {
    "vram_threshold_percent": (30, 90),
    "blocks_to_swap": (0, 48),
    "num_cuda_streams": (1, 16),
    "bandwidth_target": (0.1, 1.0),
    "vace_blocks_to_swap": (0, 15),
}
# each preset with the share of the card at which it begins
PRESETS = {
    "fast preview": 50,
    "standard": 50,
    "high quality": 50,
    "memory optimized": 40,
    "speed optimized": 60,
}
PLAN, REPORT, PICTURE = 1, 2, 3  # outputs
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def planner(**inputs: Any) -> Patch:
    """The node under test, with its defaults but for ``inputs``."""
    return NODE, {**DEFAULTS, **inputs}


def planned(model: list[Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """Nodes `plan`, the one under test, and `tell`, which tells its report and its picture."""
    connected = {} if model is None else {"model": model}
    return {
        "plan": node(NODE, **DEFAULTS | inputs, **connected),
        "tell": node("TestTellReport", text=["plan", REPORT], picture=["plan", PICTURE]),
    }


@dataclass(frozen=True)
class Told:
    """The report in lines and what there is to know of the picture."""

    lines: list[str]
    picture: dict[str, Any]

    def line(self, start: str) -> str:
        """The only line that starts so."""
        (line,) = [line for line in self.lines if line.startswith(start)]
        return line

    def has(self, start: str) -> bool:
        """Whether a line starts so."""
        return any(line.startswith(start) for line in self.lines)


def told(entry: Mapping[str, Any]) -> Told:
    """What `tell` told in a finished prompt."""
    text, picture = entry["outputs"]["tell"]["text"]
    return Told(text.splitlines(), json.loads(picture))


def ask(server: ComfyServer, **inputs: Any) -> Told:
    """What the node tells of these inputs, without a sampler."""
    return told(server.run(planned(**inputs)))


def sizes(line: str) -> list[float]:
    """All sizes in a line, in bytes."""
    return [float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) ([KMGT]i?B|B)\b", line)]


def assert_is_a_picture(picture: Mapping[str, Any], *, of_a_plan: bool) -> None:
    """One RGB picture as ComfyUI has them, with something on it; that of a plan is more than words."""
    count, height, width, channels = picture["shape"]
    assert (count, channels, picture["dtype"]) == (1, 3, "float32")
    assert width == 1400
    assert (400 if of_a_plan else 100) < height < 3000
    assert 0 <= picture["least"] < picture["greatest"] <= 1
    assert picture["shades"] > 8


def attached(log: str) -> list[str]:
    """The mode of each time that the engine was attached in a part of the log."""
    return re.findall(r"block swap \((\w+)\) attached", log)


def wrap(**inputs: Any) -> Patch:
    """A BlockSwapWrapper that follows the plan of node `plan`: its own limit would be refused."""
    numbers = {"max_vram_gb": 0.001, "block_size_mb": 1, "swap_mode": "layerwise", "empty_cache_freq": 0}
    return "BlockSwapWrapper", {**numbers, "plan": ["plan", PLAN], **inputs}


@pytest.fixture(scope="module")
def strange(comfy_server: ComfyServer) -> Iterator[str]:
    """File name of a model with 4 blocks in a list that the engine knows, of a family that it does not."""
    weights = {f"blocks.{i}.strange.weight": torch.zeros(64, 64) for i in range(4)}
    path = comfy_server.models / "diffusion_models" / "strange.safetensors"
    save_file({**weights, "strange_head.weight": torch.zeros(8, 64)}, path)
    yield path.name
    path.unlink()


# -- what the frontend shows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NODE, "BlockSwapWrapper", "BlockSwapWrapperWanVideo"])
def test_every_input_and_output_is_described_for_people(comfy_server: ComfyServer, name: str) -> None:
    info = comfy_server.object_info(name)
    assert info["description"]
    assert info["category"] == "Intelligent VRAM"
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    silent = [key for key, value in inputs.items() if len(value) < 2 or not value[1].get("tooltip")]
    assert silent == []
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])


def test_inputs_have_the_names_ranges_and_defaults_that_users_know(comfy_server: ComfyServer) -> None:
    info = comfy_server.object_info(NODE)
    required = info["input"]["required"]
    assert {name: value[1]["default"] for name, value in required.items()} == DEFAULTS
    assert {name: (required[name][1]["min"], required[name][1]["max"]) for name in RANGES} == RANGES
    assert set(required["preset"][0]) == {"custom", *PRESETS}
    assert info["input"]["optional"]["model"][0] == "MODEL,WANVIDEOMODEL"
    assert info["output"] == ["BLOCKSWAPARGS", "INTELLIGENT_VRAM_PLAN", "STRING", "IMAGE"]
    for wrapper in ("BlockSwapWrapper", "BlockSwapWrapperWanVideo"):
        assert comfy_server.object_info(wrapper)["input"]["optional"]["plan"][0] == info["output"][PLAN]


@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range_is_rejected_before_anything_runs(comfy_server: ComfyServer, name: str) -> None:
    for value in (RANGES[name][0] - 1, RANGES[name][1] + 1):
        with pytest.raises(PromptFailed, match=f"(?s)rejected.*{name}"):
            comfy_server.run(planned(**{name: value}))


def test_all_model_files_are_listed(comfy_server: ComfyServer, wan: str, hunyuan: str) -> None:
    names = comfy_server.object_info(NODE)["input"]["required"]["model_name"][0]
    assert names[0] == DEFAULTS["model_name"]
    assert {wan, hunyuan} <= set(names)


# -- in front of a KSampler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["alone", "model", "model_name"])
def test_defaults_in_front_of_a_ksampler(comfy_server: ComfyServer, wan: str, how: str) -> None:
    """The plan of the defaults alone, of the connected model and of its file."""
    expected = saved_latent(comfy_server.run(text_to_video(wan, steps=3, cfg=3.0)))
    inputs = {"model_name": wan} if how == "model_name" else {}
    extra = planned(["model", 0] if how == "model" else None, **inputs)
    start = len(comfy_server.log_text())
    entry = comfy_server.run(text_to_video(wan, steps=3, cfg=3.0, between=[wrap()], extra=extra))
    assert torch.equal(saved_latent(entry), expected)
    assert attached(comfy_server.log_text()[start:]) == ["adaptive"]
    report = told(entry)
    assert_is_a_picture(report.picture, of_a_plan=how != "alone")
    if how == "alone":
        assert "no model is connected or named, so nothing is predicted" in report.line("Note:")
    else:
        assert "Wan" in report.line("Model:")
        assert " in 6 blocks; " in report.line("Model:")
        assert report.has("Prediction:")


@pytest.mark.parametrize("pack", ["wan_vace", "hunyuan"])
def test_blocks_that_the_plan_streams_give_the_same_latent(
    comfy_server: ComfyServer, pack: str, request: pytest.FixtureRequest
) -> None:
    name, pooled = request.getfixturevalue(pack), HUNYUAN_POOLED_DIM if pack == "hunyuan" else 0
    expected = saved_latent(comfy_server.run(text_to_video(name, pooled_dim=pooled)))
    extra = planned(model_name=name, blocks_to_swap=3)
    start = len(comfy_server.log_text())
    entry = comfy_server.run(text_to_video(name, pooled_dim=pooled, between=[wrap()], extra=extra))
    assert torch.equal(saved_latent(entry), expected)
    assert re.search(r"attached to .*begins with 3 of \d+ units streamed", comfy_server.log_text()[start:])
    assert "exactly as chosen" in told(entry).line("Chosen:")


def test_the_report_of_a_connected_model_stays_the_same_once_it_has_been_streamed(
    comfy_server: ComfyServer, wan: str
) -> None:
    """Before, after and, behind the wrapper, of the streamed model itself."""
    comfy_server.free()
    lines = []
    for seed in (21, 22):
        prompt = text_to_video(wan, between=[wrap()], extra=planned(["model", 0]), seed=seed)
        lines.append(told(comfy_server.run(prompt)).line("Model:"))
    behind = text_to_video(wan, between=[wrap(plan=["first", PLAN])], seed=23)
    behind |= {"first": node(NODE, **DEFAULTS), **planned(["patch0", 0])}
    entry = comfy_server.run(behind)
    lines.append(told(entry).line("Model:"))
    assert lines == [lines[0]] * 3
    assert " in 6 blocks; " in lines[0]


def test_another_seed_loads_and_packs_nothing_again(comfy_server: ComfyServer, wan: str) -> None:
    """The node plans anew for what is free now, and what it planned before stays good."""
    expected = saved_latent(comfy_server.run(text_to_video(wan, seed=32)))
    extra = planned(["model", 0], blocks_to_swap=2)
    comfy_server.run(text_to_video(wan, between=[wrap()], extra=extra, seed=31))
    start = len(comfy_server.log_text())
    entry = comfy_server.run(text_to_video(wan, between=[wrap()], extra=extra, seed=32))
    assert torch.equal(saved_latent(entry), expected)
    assert "model" in cached_nodes(entry)
    packed = re.findall(r"attached to \w+ in [\d.]+ s: ([\d.]+ \w+) packed", comfy_server.log_text()[start:])
    assert set(packed) <= {"0 B"}


def test_the_same_prompt_again_is_not_sampled_again(comfy_server: ComfyServer, wan: str) -> None:
    prompt = text_to_video(wan, between=[wrap()], extra=planned(model_name=wan), seed=33)
    comfy_server.run(prompt)
    assert "sampler" in cached_nodes(comfy_server.run(prompt))


# -- in front of WanVideoWrapper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "vace", "fp8", "gguf"])
def test_defaults_in_front_of_wanvideowrapper(sampler: Sampler, kind: str) -> None:
    """block_swap_args into WanVideoModelLoader in place of WanVideoBlockSwap, nothing else."""
    sampled = sampler.sample(kind, swap=planner())
    assert torch.equal(sampled.latent, sampler.reference(kind))
    (run,) = runs(sampled.log)
    assert (run.mode, run.forwards) == ("adaptive", 2)


@pytest.mark.parametrize("way", ["swap", "set_swap"])
def test_manual_numbers_in_front_of_wanvideowrapper(sampler: Sampler, way: str) -> None:
    patch = planner(
        model_name=sampler.models["vace"],
        blocks_to_swap=20,
        vace_blocks_to_swap=8,
        offload_txt_emb=True,
        offload_img_emb=True,
    )
    run = assert_streamed(sampler.sample("vace", **{way: patch}), sampler.reference("vace"))
    assert (run.streamed, run.units) == (28, BLOCKS + VACE_BLOCKS)


def test_a_plan_that_is_decided_once_is_chunkwise(sampler: Sampler) -> None:
    patch = planner(model_name=sampler.models["plain"], blocks_to_swap=5, enable_cuda_optimization=False)
    assert_streamed(sampler.sample("plain", swap=patch), sampler.reference("plain"), mode="chunkwise")


@pytest.mark.parametrize("connected", [False, True])
def test_the_wrapper_for_wanvideo_takes_the_plan(sampler: Sampler, connected: bool) -> None:
    """Its own limit would be refused, and its own number of blocks is not the plan's."""
    name = sampler.models["plain"]
    extra = planned(["model", 0], blocks_to_swap=20) if connected else planned(model_name=name, blocks_to_swap=20)
    ours = wanvideo_swap(max_vram_gb=0.001, plan=["plan", PLAN])
    run = assert_streamed(sampler.sample("plain", between=[ours], extra=extra), sampler.reference("plain"))
    assert (run.streamed, run.units) == (20, BLOCKS)


@pytest.mark.parametrize("connected", [False, True])
def test_the_plan_stands_above_the_block_numbers_of_the_wrapper_for_wanvideo(sampler: Sampler, connected: bool) -> None:
    """As its tooltip says: "used instead of the numbers here"."""
    extra = planned(model_name=sampler.models["plain"], blocks_to_swap=20)
    ours = wanvideo_swap(blocks_to_swap=3, vace_blocks_to_swap=2, plan=["plan", PLAN])
    way: dict[str, Any] = {"between": [ours]} if connected else {"swap": ours}
    run = assert_streamed(sampler.sample("plain", **way, extra=extra), sampler.reference("plain"))
    assert (run.streamed, run.units) == (20, BLOCKS)


@pytest.mark.parametrize("kind", ["plain", "vace", "fp8", "gguf"])
def test_a_connected_wanvideomodel_is_reported_as_its_file(sampler: Sampler, kind: str) -> None:
    """Before its weights are loaded, once they have been streamed, and by the header of its file alone."""
    blocks = BLOCKS + VACE_BLOCKS * (kind == "vace")
    sampler.server.free()
    reports = []
    for seed in (0, 1):
        prompt = sampler.prompt(kind, between=[wanvideo_swap(kind)], extra=planned(["model", 0]), seed=seed)
        reports.append(told(sampler.server.run(prompt)))
    reports.append(ask(sampler.server, model_name=sampler.models[kind]))
    for report in reports:
        assert re.search(rf"Wan .* {blocks} blocks.* tokens in WanVideoWrapper", report.line("Model:"))
        assert report.has("Prediction:")
        assert_is_a_picture(report.picture, of_a_plan=True)
    whole, inside = zip(*(sizes(report.line("Model:"))[:2] for report in reports), strict=True)
    # a loader may cast what lies outside the blocks
    assert max(inside) < 1.05 * min(inside), [report.line("Model:") for report in reports]
    assert max(whole) < 1.2 * min(whole), [report.line("Model:") for report in reports]


def test_another_seed_does_not_load_the_model_again(sampler: Sampler) -> None:
    """A loader that takes block_swap_args reads the whole file when they are made anew."""
    patch = planner(model_name=sampler.models["plain"], blocks_to_swap=10)
    for seed in (0, 1):
        entry = sampler.server.run(sampler.prompt("plain", swap=patch, seed=seed))
        assert torch.equal(saved_latent(entry), sampler.reference("plain", seed=seed))
    assert "model" in cached_nodes(entry)


def test_a_connected_model_that_is_not_offloaded_is_reported_whole(sampler: Sampler) -> None:
    """The engine is still on it when the second prompt begins."""
    lines = []
    for seed in (0, 1):
        prompt = sampler.prompt(
            "plain",
            between=[wanvideo_swap(blocks_to_swap=20, max_vram_gb=0.0)],
            extra=planned(["model", 0]),
            seed=seed,
            force_offload=seed == 1,
        )
        lines.append(told(sampler.server.run(prompt)).line("Model:"))
    assert f" in {BLOCKS} blocks; " in lines[0]
    assert lines[1] == lines[0]


# -- what is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(comfy_server: ComfyServer, wan: str, preset: str) -> None:
    """A preset sets the threshold and the tuning, whatever the inputs say."""
    report = ask(
        comfy_server,
        model_name=wan,
        preset=preset,
        vram_threshold_percent=90.0,
        auto_hardware_tuning=False,
        num_cuda_streams=16,
    )
    assert f"threshold {PRESETS[preset]}% is " in report.line("Balance:")
    assert "the best number of slots" in report.line("Chosen:")
    assert report.has("Prediction:")
    assert_is_a_picture(report.picture, of_a_plan=True)


def test_inputs_without_a_preset_count(comfy_server: ComfyServer, wan: str) -> None:
    manual = {"model_name": wan, "auto_hardware_tuning": False, "blocks_to_swap": 4}
    report = ask(comfy_server, **manual, vram_threshold_percent=33.0, num_cuda_streams=12)
    assert "threshold 33% is " in report.line("Balance:")
    assert " 6 slots," in report.line("Chosen:")
    assert " 3 slots," in ask(comfy_server, **manual, num_cuda_streams=6).line("Chosen:")
    pageable = ask(comfy_server, **manual, enable_dram_optimization=False)
    assert "page-locked RAM up to 0 B" in pageable.line("Chosen:")
    assert "will not be page-locked" in pageable.line("Note:")


def test_more_pixels_are_more_tokens_and_more_time(comfy_server: ComfyServer, wan: str) -> None:
    small, large = (ask(comfy_server, model_name=wan, width=size, height=size) for size in (256, 1024))
    tokens = [int(re.search(r"([\d,]+) tokens", r.line("Model:"))[1].replace(",", "")) for r in (small, large)]
    assert tokens == [21 * 16 * 16, 21 * 64 * 64]
    seconds = [float(re.search(r"([\d.]+) s a forward", r.line("Prediction:"))[1]) for r in (small, large)]
    assert seconds[0] < seconds[1]


def test_the_last_run_is_predicted_from_what_it_took(comfy_server: ComfyServer, wan: str) -> None:
    """A run after a larger video expects more than one after a smaller, whatever the size in the node says."""
    compute = []
    for seed, size in enumerate((64, 512, 64)):
        extra = planned(["model", 0], predict_for="the last run")
        prompt = text_to_video(wan, width=size, height=size, seed=40 + seed, between=[wrap()], extra=extra)
        report = told(comfy_server.run(prompt))
        if seed:
            note = report.line("Note: predicted for the same")
            compute.append(float(re.search(r"([\d.]+) s of compute a forward", note)[1]))
    assert compute[0] < compute[1]


def test_without_a_last_run_the_size_is_predicted_for(comfy_server: ComfyServer, wan_vace: str) -> None:
    other = comfy_server.models / "diffusion_models" / "never_run.safetensors"
    write_wan(other, blocks=4)
    report = ask(comfy_server, model_name=other.name, predict_for="the last run")
    assert "has not run" in report.line("Note: this model")
    assert report.line("Model:") == ask(comfy_server, model_name=other.name).line("Model:")
    other.unlink()


def test_the_prediction_adds_up_and_stays_below_the_limit(comfy_server: ComfyServer, wan: str) -> None:
    peak, limit, *parts = sizes(ask(comfy_server, model_name=wan, blocks_to_swap=2).line("Prediction:"))[:7]
    assert peak <= limit
    assert sum(parts) == pytest.approx(peak, rel=0.01)


def test_more_blocks_than_there_are(comfy_server: ComfyServer, wan: str) -> None:
    """They are all of them, and the report says so."""
    expected = saved_latent(comfy_server.run(text_to_video(wan)))
    extra = planned(model_name=wan, blocks_to_swap=48, vace_blocks_to_swap=15)
    start = len(comfy_server.log_text())
    entry = comfy_server.run(text_to_video(wan, between=[wrap()], extra=extra))
    assert torch.equal(saved_latent(entry), expected)
    assert re.search(r"attached to .*begins with 6 of 6 units streamed", comfy_server.log_text()[start:])
    notes = "\n".join(told(entry).lines)
    assert "48 blocks are to be streamed, but the model has 6" in notes
    assert "15 VACE blocks are to be streamed, but the model has 0" in notes


def test_more_blocks_than_there_are_of_a_model_that_the_plan_does_not_know(comfy_server: ComfyServer, wan: str) -> None:
    expected = saved_latent(comfy_server.run(text_to_video(wan)))
    extra = planned(blocks_to_swap=48)
    start = len(comfy_server.log_text())
    entry = comfy_server.run(text_to_video(wan, between=[wrap()], extra=extra))
    assert torch.equal(saved_latent(entry), expected)
    assert re.search(r"attached to .*begins with 6 of 6 units streamed", comfy_server.log_text()[start:])


def test_debug_mode_writes_the_report_to_the_log(comfy_server: ComfyServer, wan: str) -> None:
    start = len(comfy_server.log_text())
    report = ask(comfy_server, model_name=wan, debug_mode=True)
    comfy_server.wait_log("[VRAM] Prediction:", start=start)
    log = comfy_server.log_text()[start:]
    assert [line for line in report.lines if f"[VRAM] {line}" not in log] == []
    start = len(comfy_server.log_text())
    ask(comfy_server, model_name=wan)
    assert "[VRAM]" not in comfy_server.log_text()[start:]


def test_debug_mode_tells_each_forward_of_wanvideowrapper(sampler: Sampler) -> None:
    sampled = sampler.sample("plain", swap=planner(debug_mode=True, blocks_to_swap=10), steps=3)
    assert torch.equal(sampled.latent, sampler.reference("plain", steps=3))
    assert re.findall(r"block swap: forward (\d+): [\d.]+ ms, .* streamed", sampled.log) == ["0", "1", "2"]
    assert "[VRAM] Chosen:" in sampled.log


def test_the_connected_model_counts_and_not_the_named_one(comfy_server: ComfyServer, wan: str, hunyuan: str) -> None:
    prompt = text_to_video(wan, extra=planned(["model", 0], model_name=hunyuan))
    assert "Wan" in told(comfy_server.run(prompt)).line("Model:")
    other = ask(comfy_server, model_name=hunyuan)
    assert "Wan" not in other.line("Model:")
    assert "were measured with Wan, not with" in "\n".join(other.lines)


# -- bad input ------------------------------------------------------------------------------------------------------------


def test_of_a_model_of_an_unknown_family_nothing_is_predicted(comfy_server: ComfyServer, strange: str) -> None:
    report = ask(comfy_server, model_name=strange)
    assert "Unknown family" in report.line("Model:")
    assert " in 4 blocks; " in report.line("Model:")
    assert not report.has("Prediction:")
    note = report.line("Note:")
    assert "its family is not known" in note
    assert "nothing is predicted" in note
    assert_is_a_picture(report.picture, of_a_plan=False)


def _cut_off(data: bytes) -> bytes:
    """So much of a file as an interrupted download leaves."""
    return data[: len(data) // 2]


def _cut_in_header(data: bytes) -> bytes:
    return data[:1000]


def _huge_header(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


def _empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_cut_off, r"incomplete|cut off|ends|download"),
        (_cut_in_header, r"incomplete|cut off|ends|download"),
        (_huge_header, r"not a safetensors file"),
        (_empty, r"not a safetensors file|empty"),
    ],
)
def test_a_broken_file_is_a_clear_error_and_comfyui_goes_on(
    comfy_server: ComfyServer, wan: str, spoil: Any, why: str
) -> None:
    path = write_wan(comfy_server.models / "diffusion_models" / "broken.safetensors", blocks=1)
    try:
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(PromptFailed, match=r"node plan \(IntelligentVRAMNode\) raised .*ModelUnreadable") as failed:
            comfy_server.run(planned(model_name=path.name))
    finally:
        path.unlink()
    assert re.search(rf"broken\.safetensors: .*({why})", str(failed.value).splitlines()[0])
    assert ask(comfy_server, model_name=wan).has("Prediction:")


def test_a_file_that_is_gone_is_a_clear_error(comfy_server: ComfyServer, wan: str) -> None:
    with pytest.raises(PromptFailed, match=r"(?s)rejected.*gone\.safetensors"):
        comfy_server.run(planned(model_name="gone.safetensors"))
    assert ask(comfy_server, model_name=wan).has("Prediction:")


def test_a_size_below_one_token_is_a_clear_error(comfy_server: ComfyServer, wan: str) -> None:
    assert ask(comfy_server, model_name=wan, width=16, height=16, num_frames=1).has("Prediction:")
    with pytest.raises(PromptFailed, match=r"(?s)rejected.*width"):
        comfy_server.run(planned(model_name=wan, width=8))
