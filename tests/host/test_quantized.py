"""QuantizedModelLoader and SaveQuantizedModel in a real ComfyUI, over its HTTP API: the same latents to the bit with and
without block swap, from the file and from a saved one; what cannot be is refused, and nothing is left behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .checkpoints import write_lora, write_wan
from .comfy import ComfyServer, Host, PromptFailed
from .conftest import LORA_LAYERS
from .test_intelligent_vram import DEFAULTS as PLAN_DEFAULTS
from .wanvideo import Sampler, node, scaled_fp8
from .workflows import Patch, lora, probed, saved_latent, text_to_video

pytestmark = pytest.mark.host

LOADER, SAVER = "QuantizedModelLoader", "SaveQuantizedModel"
FORMATS = ("fp8_e4m3fn", "fp8_e5m2", "int8", "int8_convrot")
MODES = ("adaptive", "chunkwise", "layerwise")
KEEP = "norm|embed|modulation"
TENSOR_CORES, DEQUANTIZE = "tensor cores", "dequantize"
NEW = (0, 33)  # the first version that the formats are tested on


@pytest.fixture
def reads_all(comfy_host: Host) -> None:
    """Only on a ComfyUI that reads all formats."""
    if comfy_host.version < NEW:
        pytest.skip(f"ComfyUI {comfy_host.version} reads FP8 in its older layout only")


@pytest.fixture
def formats(comfy_host: Host) -> tuple[str, ...]:
    """What this ComfyUI reads."""
    return FORMATS if comfy_host.version >= NEW else FORMATS[:1]


@pytest.fixture
def models(comfy_server: ComfyServer) -> Iterator[Path]:
    """The folder of diffusion models; what a test writes there goes with it."""
    folder = comfy_server.models / "diffusion_models"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def loader(model_name: str, quantization: str, *, swap_mode: str | None = None, **inputs: Any) -> dict[str, Any]:
    """The node that loads, with block swap in `swap_mode`; a limit of 0.02 GiB holds a bf16 model's blocks only in part."""
    settings = {
        "compute": TENSOR_CORES,
        "keep_high_precision": KEEP,
        "offload_mode": "none" if swap_mode is None else "block_swap",
        "max_vram_gb": 0.013,
        "block_size_mb": 1,
        "swap_mode": swap_mode or "adaptive",
    }
    return node(LOADER, model_name=model_name, quantization=quantization, **(settings | inputs))


def prompt_of(model_name: str, quantization: str, *, between: Any = (), probe: bool = False, **inputs: Any) -> dict:
    """Load, sample, save the latent, and tell the report."""
    prompt = text_to_video(model_name, between=between, probe=probe)
    prompt["model"] = loader(model_name, quantization, **inputs)
    prompt["tell"] = node("TestTellText", text=["model", 1])
    return prompt


def sample(server: ComfyServer, model_name: str, quantization: str, **scene: Any) -> tuple[torch.Tensor, str]:
    """The latent and the report."""
    entry = server.run(prompt_of(model_name, quantization, **scene))
    return saved_latent(entry), entry["outputs"]["tell"]["text"][0]


def plain(server: ComfyServer, model_name: str, *between: Patch) -> torch.Tensor:
    """The latent of ComfyUI's own loader."""
    return saved_latent(server.run(text_to_video(model_name, between=between)))


def save(server: ComfyServer, model_name: str, quantization: str, **inputs: Any) -> tuple[str, str]:
    """Convert a file; the report and the name of the new one."""
    settings = {"compute": TENSOR_CORES, "keep_high_precision": KEEP, "filename": "", "overwrite": False}
    entry = server.run({"save": node(SAVER, model_name=model_name, quantization=quantization, **(settings | inputs))})
    return tuple(entry["outputs"]["save"]["text"])


def difference(latent: torch.Tensor, expected: torch.Tensor) -> float:
    """||latent - expected|| / ||expected||."""
    return ((latent - expected).norm() / expected.norm()).item()


def leftovers(folder: Path, before: set[Path]) -> set[str]:
    return {path.name for path in set(folder.iterdir()) - before}


# -- loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LOADER, SAVER])
def test_the_nodes_are_described_for_people(comfy_server: ComfyServer, name: str) -> None:
    info = comfy_server.object_info(name)
    assert info["description"]
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    assert all(options[1].get("tooltip") for options in inputs.values())
    assert all(info["output_tooltips"])
    assert len(info["output_tooltips"]) == len(info["output"])
    assert inputs["quantization"][0][:4] == list(FORMATS)
    assert inputs["keep_high_precision"][1]["default"]


def test_a_quantized_model_is_near_the_original_and_streams_to_the_bit(
    comfy_server: ComfyServer, wan: str, formats: tuple[str, ...]
) -> None:
    original = plain(comfy_server, wan)
    for quantization in formats:
        for compute in (TENSOR_CORES, DEQUANTIZE):
            whole, report = sample(comfy_server, wan, quantization, compute=compute)
            assert 0 < difference(whole, original) < 0.3, quantization
            assert quantization in report
            for mode in MODES:
                streamed, report = sample(comfy_server, wan, quantization, compute=compute, swap_mode=mode)
                assert torch.equal(streamed, whole), (quantization, compute, mode)
                assert "block swap: its blocks are streamed" in report


def test_the_weights_take_half_of_the_memory(comfy_server: ComfyServer, wan: str, formats: tuple[str, ...]) -> None:
    whole = probed(comfy_server.run(text_to_video(wan, probe=True)))["model_size"]
    for quantization in formats:
        entry = comfy_server.run(prompt_of(wan, quantization, probe=True))
        assert probed(entry)["model_size"] < 0.7 * whole


def test_the_model_that_streams_is_inside_its_limit(comfy_server: ComfyServer, wan: str) -> None:
    report = probed(comfy_server.run(prompt_of(wan, "fp8_e4m3fn", swap_mode="adaptive", probe=True)))
    assert report["patcher"] == "StreamedModelPatcher"
    assert 0 < report["loaded_size"] <= 0.013 * (1 << 30)


def test_compute_changes_the_result_of_int8(comfy_server: ComfyServer, wan: str, reads_all: None) -> None:
    original = plain(comfy_server, wan)
    products, report = sample(comfy_server, wan, "int8")
    dequantized, other = sample(comfy_server, wan, "int8", compute=DEQUANTIZE)
    assert difference(dequantized, original) < difference(products, original)
    assert "INT8 products" in report
    assert "dequantized for each layer" in other


def test_what_is_kept_is_told_and_lessens_the_error(comfy_server: ComfyServer, wan: str, reads_all: None) -> None:
    original = plain(comfy_server, wan)
    less, report = sample(comfy_server, wan, "fp8_e4m3fn", keep_high_precision="ffn")
    more, _ = sample(comfy_server, wan, "fp8_e4m3fn", keep_high_precision="")
    assert "48 layers" in report
    assert difference(less, original) < difference(more, original)
    nothing, _ = sample(comfy_server, wan, "none")
    assert torch.equal(nothing, original)
    assert torch.equal(sample(comfy_server, wan, "none", swap_mode="layerwise")[0], original)


def test_loras_work_on_quantized_models(comfy_server: ComfyServer, wan: str, wan_lora: str, formats: tuple) -> None:
    for quantization in formats:
        for compute in (TENSOR_CORES, DEQUANTIZE):
            scene = {"compute": compute, "between": [lora(wan_lora, 0.7)]}
            with_lora, _ = sample(comfy_server, wan, quantization, **scene)
            assert difference(with_lora, plain(comfy_server, wan, lora(wan_lora, 0.7))) < 0.3
            assert difference(with_lora, sample(comfy_server, wan, quantization, compute=compute)[0]) > 0.01
            for mode in ("adaptive", "layerwise"):
                assert torch.equal(sample(comfy_server, wan, quantization, swap_mode=mode, **scene)[0], with_lora)


def test_a_model_in_several_files_loads_and_is_saved_as_one(
    comfy_server: ComfyServer, wan: str, models: Path, formats: tuple[str, ...]
) -> None:
    weights = load_file(models / wan)
    names = sorted(weights)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file({name: weights[name] for name in part}, models / f"split-0000{number}-of-00002.safetensors")
    chosen = "split-00001-of-00002.safetensors"
    for quantization in (formats[-1], "none"):
        expected, _ = sample(comfy_server, wan, quantization)
        assert torch.equal(sample(comfy_server, chosen, quantization)[0], expected)
    _, name = save(comfy_server, chosen, formats[-1])
    assert name == f"split_{formats[-1]}.safetensors"
    assert torch.equal(plain(comfy_server, name), sample(comfy_server, wan, formats[-1])[0])


def test_a_checkpoint_with_prefixes_and_other_models_loads(
    comfy_server: ComfyServer, wan: str, models: Path, formats: tuple[str, ...]
) -> None:
    weights = load_file(models / wan)
    whole = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    whole["vae.decoder.weight"] = torch.ones(64, 64)
    (comfy_server.models / "checkpoints").mkdir(exist_ok=True)
    save_file(whole, comfy_server.models / "checkpoints" / "whole.safetensors")
    for quantization in (*formats, "none"):
        expected, _ = sample(comfy_server, wan, quantization)
        assert torch.equal(sample(comfy_server, "whole.safetensors", quantization)[0], expected)
    (comfy_server.models / "checkpoints" / "whole.safetensors").unlink()


def test_a_connected_plan_is_used_for_block_swap_alone(comfy_server: ComfyServer, wan: str) -> None:
    expected, _ = sample(comfy_server, wan, "fp8_e4m3fn")
    for mode, words in (("adaptive", "its blocks are streamed"), (None, "the plan is not used")):
        # a limit that is too small, were it not for the plan
        prompt = prompt_of(wan, "fp8_e4m3fn", swap_mode=mode, max_vram_gb=0.0001, plan=["plan", 1])
        prompt["plan"] = node("IntelligentVRAMNode", **(PLAN_DEFAULTS | {"model_name": wan, "blocks_to_swap": 4}))
        entry = comfy_server.run(prompt)
        assert torch.equal(saved_latent(entry), expected)
        assert words in entry["outputs"]["tell"]["text"][0]


def test_a_deep_clone_has_the_same_weights(comfy_server: ComfyServer, wan: str, models: Path, reads_all: None) -> None:
    """The host makes one for each further GPU; it loads the model again."""
    _, saved = save(comfy_server, wan, "int8")
    for name, quantization in ((wan, "int8"), (wan, "fp8_e4m3fn"), (saved, "none"), (wan, "none")):
        for compute in (TENSOR_CORES, DEQUANTIZE):
            expected, _ = sample(comfy_server, name, quantization, compute=compute)
            clone: Patch = ("TestDeepClone", {})
            assert torch.equal(sample(comfy_server, name, quantization, compute=compute, between=[clone])[0], expected)


def test_with_a_comfy_kitchen_that_is_too_old_only_unquantized_models_load(comfy_host: Host, tmp_path: Path) -> None:
    if comfy_host.version < NEW:
        pytest.skip("this ComfyUI does without comfy-kitchen")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import comfy_kitchen.tensor\ndel comfy_kitchen.tensor.AsymW4A8Int8Layout"
    )
    with ComfyServer(comfy_host, tmp_path, env={"PYTHONPATH": str(tmp_path / "hidden")}) as server:
        name = write_wan(server.models / "diffusion_models" / "wan.safetensors").name
        for run in (sample, save):
            with pytest.raises(PromptFailed, match="comfy-kitchen, which is missing, or older"):
                run(server, name, "fp8_e4m3fn")
        assert sample(server, name, "none")[0].isfinite().all()


# -- saving --------------------------------------------------------------------------------------------------------------


def test_a_saved_file_gives_the_same_latent_in_comfyui_s_own_loader(
    comfy_server: ComfyServer, wan: str, wan_lora: str, models: Path, formats: tuple[str, ...]
) -> None:
    for quantization in formats:
        before = set(models.iterdir())
        report, name = save(comfy_server, wan, quantization)
        assert name == f"wan_{quantization}.safetensors"
        assert leftovers(models, before) == {name}
        assert quantization in report
        assert (models / name).stat().st_size < 0.7 * (models / wan).stat().st_size
        assert torch.equal(plain(comfy_server, name), sample(comfy_server, wan, quantization)[0])
        patched = sample(comfy_server, wan, quantization, between=[lora(wan_lora)])[0]
        assert torch.equal(plain(comfy_server, name, lora(wan_lora)), patched)
        again, report = sample(comfy_server, name, "fp8_e4m3fn")
        assert "quantized already" in report
        assert torch.equal(again, plain(comfy_server, name))
        assert torch.equal(sample(comfy_server, name, "none", swap_mode="chunkwise")[0], again)


def test_compute_is_honoured_for_a_file_that_is_quantized_already(
    comfy_server: ComfyServer, wan: str, models: Path, reads_all: None
) -> None:
    for quantization in FORMATS:
        _, name = save(comfy_server, wan, quantization, compute=DEQUANTIZE, filename=f"full {quantization}")
        for compute in (TENSOR_CORES, DEQUANTIZE):
            for scene in ({}, {"swap_mode": "adaptive"}):
                expected, _ = sample(comfy_server, wan, quantization, compute=compute)
                assert torch.equal(sample(comfy_server, name, "int8", compute=compute, **scene)[0], expected)


def test_fp8_products_are_chosen_where_the_device_has_them(comfy_host: Host, tmp_path: Path) -> None:
    """A CPU has them too, where ComfyUI is told so."""
    if comfy_host.version < NEW or comfy_host.cuda:
        pytest.skip("this ComfyUI does not take its CPU for a device with FP8")
    args, env = ["--supports-fp8-compute"], {"INTELLIGENT_VRAM_FORCE": "1"}
    with ComfyServer(comfy_host, tmp_path, args=args, env=env) as server:
        name = write_wan(server.models / "diffusion_models" / "wan.safetensors").name
        products, report = sample(server, name, "fp8_e4m3fn")
        assert "FP8 matrix products" in report
        dequantized, _ = sample(server, name, "fp8_e4m3fn", compute=DEQUANTIZE)
        assert not torch.equal(products, dequantized)
        for mode in MODES:
            assert torch.equal(sample(server, name, "fp8_e4m3fn", swap_mode=mode)[0], products)
        _, full = save(server, name, "fp8_e4m3fn", compute=DEQUANTIZE, filename="full")
        _, fast = save(server, name, "fp8_e4m3fn", filename="fast")
        assert torch.equal(plain(server, full), dequantized)
        assert torch.equal(plain(server, fast), products)
        assert torch.equal(sample(server, full, "none")[0], products)
        assert torch.equal(sample(server, fast, "none", compute=DEQUANTIZE)[0], dequantized)
        e5m2, _ = sample(server, name, "fp8_e5m2")
        assert torch.equal(sample(server, name, "fp8_e5m2", compute=DEQUANTIZE)[0], e5m2)


def test_older_scaled_fp8_files_pass_through(comfy_server: ComfyServer, wan: str, models: Path) -> None:
    save_file(scaled_fp8(load_file(models / wan)), models / "older.safetensors")
    expected = plain(comfy_server, "older.safetensors")
    for quantization in ("fp8_e4m3fn", "none"):
        for scene in ({}, {"swap_mode": "adaptive"}):
            latent, report = sample(comfy_server, "older.safetensors", quantization, **scene)
            assert torch.equal(latent, expected)
            assert "loaded as ComfyUI loads it" in report


def test_wanvideowrapper_loads_a_saved_fp8_file(sampler: Sampler) -> None:
    source = sampler.models["plain"]
    _, name = save(sampler.server, source, "fp8_e4m3fn", filename="ours_fp8")
    ours = Sampler(sampler.server, sampler.models | {"ours": name})
    latent = ours.sample("ours").latent
    assert 0 < difference(latent, ours.sample("plain").latent) < 0.2


# -- what cannot be ------------------------------------------------------------------------------------------------------


def damaged(folder: Path, wan: str, kind: str) -> str:
    """A file that no model can be loaded from."""
    path = folder / f"damaged_{kind}.safetensors"
    if kind in ("nan", "inf"):
        weights = load_file(folder / wan)
        weights["blocks.2.ffn.0.weight"][3, 5] = float(kind)
        save_file(weights, path)
    elif kind == "cut off":
        path.write_bytes((folder / wan).read_bytes()[:-1000])
    elif kind == "pickled":
        torch.save({"blocks.0.ffn.0.weight": torch.zeros(16, 16)}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no model":
        save_file({"decoder.weight": torch.zeros(16, 16)}, path)
    return path.name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", r"blocks\.2\.ffn\.0.*NaN or infinite"),
        ("inf", r"blocks\.2\.ffn\.0.*NaN or infinite"),
        ("cut off", "damaged_cut off.safetensors: .*(ends|cut off)"),
        ("pickled", "damaged_pickled.safetensors: it is pickled"),
        ("empty", "damaged_empty.safetensors: .*"),
        ("no model", "damaged_no model.safetensors"),
    ],
)
def test_a_bad_file_is_refused_in_words_and_nothing_is_left(
    comfy_server: ComfyServer, comfy_host: Host, wan: str, models: Path, kind: str, words: str
) -> None:
    name = damaged(models, wan, kind)
    before = set(models.iterdir())
    with pytest.raises(PromptFailed, match=words):
        sample(comfy_server, name, "fp8_e4m3fn")
    if kind != "no model" or comfy_host.version >= NEW:  # the older layout needs no blocks
        with pytest.raises(PromptFailed, match=words):
            save(comfy_server, name, "fp8_e4m3fn")
    assert not leftovers(models, before)
    if kind not in ("nan", "inf"):
        with pytest.raises(PromptFailed, match=words):
            sample(comfy_server, name, "none")
    assert plain(comfy_server, wan).isfinite().all()


def test_a_missing_file_a_bad_pattern_and_bad_numbers_are_refused(
    comfy_server: ComfyServer, comfy_host: Host, wan: str
) -> None:
    with pytest.raises(PromptFailed, match=r"missing\.safetensors"):
        sample(comfy_server, "missing.safetensors", "fp8_e4m3fn")
    if comfy_host.version >= NEW:
        with pytest.raises(PromptFailed, match="no regular expression"):
            sample(comfy_server, wan, "fp8_e4m3fn", keep_high_precision="blocks.(0")
    with pytest.raises(PromptFailed, match=r"smallest limit that holds its weights"):
        sample(comfy_server, wan, "fp8_e4m3fn", swap_mode="adaptive", max_vram_gb=0.0001)
    assert plain(comfy_server, wan).isfinite().all()


def test_a_file_whose_formats_are_unknown_or_unsaid_is_refused(
    comfy_server: ComfyServer, wan: str, models: Path, reads_all: None
) -> None:
    """ComfyUI would compute noise with the second."""
    _, name = save(comfy_server, wan, "int8", filename="good")
    good = load_file(models / name)
    marks = [key for key in good if key.endswith(".comfy_quant")]
    unknown = dict(good)
    unknown[marks[0]] = torch.tensor(list(json.dumps({"format": "int9"}).encode()), dtype=torch.uint8)
    unsaid = {key: weight for key, weight in good.items() if key != marks[0]}
    for content, words in ((unknown, "int9"), (unsaid, "nothing says in which format|comfy_quant")):
        save_file(content, models / "bad.safetensors")
        for quantization in ("none", "int8"):
            with pytest.raises(PromptFailed, match=words):
                sample(comfy_server, "bad.safetensors", quantization)
        comfy_server.free()


def test_an_old_comfyui_gets_fp8_in_its_own_layout_and_is_told(
    comfy_server: ComfyServer, comfy_host: Host, wan: str, models: Path
) -> None:
    if comfy_host.version >= NEW:
        pytest.skip("this ComfyUI reads all formats")
    expected, _ = sample(comfy_server, wan, "fp8_e4m3fn")
    for quantization in FORMATS[1:]:
        latent, report = sample(comfy_server, wan, quantization)
        assert f"too old for {quantization}: fp8_e4m3fn is used instead" in report
        assert torch.equal(latent, expected)
        _, name = save(comfy_server, wan, quantization, overwrite=True)
        assert name == "wan_fp8_e4m3fn.safetensors"
    new = {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    save_file(load_file(models / wan) | new, models / "new.safetensors")
    with pytest.raises(PromptFailed, match="which this ComfyUI does not read"):
        sample(comfy_server, "new.safetensors", "fp8_e4m3fn")


@pytest.mark.parametrize("filename", ["../outside", "sub/inside", "back\\slash", "..", ".hidden", "C:drive"])
def test_a_file_is_only_written_into_the_models_folder(comfy_server: ComfyServer, wan: str, filename: str) -> None:
    before = set(comfy_server.base.rglob("*.safetensors*"))
    with pytest.raises(PromptFailed, match="name of a file without a folder"):
        save(comfy_server, wan, "fp8_e4m3fn", filename=filename)
    assert set(comfy_server.base.rglob("*.safetensors*")) == before


def test_nothing_is_overwritten_without_being_told(comfy_server: ComfyServer, wan: str, models: Path) -> None:
    kept = models / "kept.safetensors"
    kept.write_bytes(b"mine")
    with pytest.raises(PromptFailed, match=r"kept\.safetensors.*overwrit"):
        save(comfy_server, wan, "fp8_e4m3fn", filename="kept")
    assert kept.read_bytes() == b"mine"
    save(comfy_server, wan, "fp8_e4m3fn", filename="kept.safetensors", overwrite=True)
    with safe_open(kept, "pt") as file:
        assert "blocks.0.ffn.0.weight" in file.keys()  # noqa: SIM118
    source = (models / wan).read_bytes()
    with pytest.raises(PromptFailed, match="the file that is read"):
        save(comfy_server, wan, "fp8_e4m3fn", filename=wan, overwrite=True)
    assert (models / wan).read_bytes() == source


@pytest.mark.parametrize("saving", [False, True])
def test_an_interruption_leaves_nothing_behind(comfy_server: ComfyServer, wan: str, models: Path, saving: bool) -> None:
    before = set(models.iterdir())
    comfy_server.free()
    comfy_server.run({"slow": node("TestSlowProgress", seconds=0.3)})
    try:
        start = len(comfy_server.log_text())
        inputs = {"compute": TENSOR_CORES, "keep_high_precision": "^$", "filename": "broken", "overwrite": False}
        prompt = (
            {"save": node(SAVER, model_name=wan, quantization="fp8_e4m3fn", **inputs)}
            if saving
            else prompt_of(wan, "fp8_e4m3fn", keep_high_precision="^$")
        )
        prompt_id = comfy_server.queue(prompt)
        comfy_server.wait_log("TestSlowProgress: ", start=start)
        comfy_server.interrupt()
        entry = comfy_server.wait(prompt_id, check=False)
    finally:
        comfy_server.run({"slow": node("TestSlowProgress", seconds=0.0)})
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert not leftovers(models, before)
    latent, _ = sample(comfy_server, wan, "fp8_e4m3fn", keep_high_precision="^$")
    assert latent.isfinite().all()


def test_memory_does_not_grow_over_loads(comfy_server: ComfyServer, wan: str, formats: tuple[str, ...]) -> None:
    sizes = []
    for run in range(10):
        scene = {"keep_high_precision": f"^{run}$", "swap_mode": MODES[run % 3]}
        entry = comfy_server.run(prompt_of(wan, formats[run % len(formats)], probe=True, **scene))
        sizes.append(probed(entry)["rss"])
    assert sizes[-1] - sizes[4] < 24 << 20


def test_a_lora_with_two_strengths_gives_what_a_fresh_load_gives(
    comfy_server: ComfyServer, wan: str, models: Path, reads_all: None
) -> None:
    name = write_lora(comfy_server.models / "loras" / "other.safetensors", models / wan, LORA_LAYERS, seed=3).name
    for compute in (TENSOR_CORES, DEQUANTIZE):
        scene = {"compute": compute, "swap_mode": "adaptive"}
        expected = [sample(comfy_server, wan, "int8", compute=compute, between=[lora(name, s)])[0] for s in (0.3, 0.9)]
        streamed = [sample(comfy_server, wan, "int8", between=[lora(name, s)], **scene)[0] for s in (0.3, 0.9)]
        assert all(torch.equal(a, b) for a, b in zip(streamed, expected, strict=True))
