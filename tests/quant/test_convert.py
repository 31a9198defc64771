"""A whole checkpoint: names, keys and JSON as ComfyUI reads them, the same from any kind of file, in memory and in a file."""

import json

import pytest
import torch
from intelligent_vram.quant.convert import convert, into_file, into_memory, plan_conversion
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.quantize import dequantize, quantize
from intelligent_vram.quant.source import AlreadyQuantized
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.model_files import inspect_file, read_header
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import QUANTIZED, all_same, same_bits, save_sharded, wan_like

KINDS = {"fp8_e4m3fn": "scaled FP8", "fp8_e5m2": "scaled FP8", "int8": "INT8", "int8_convrot": "INT8"}


def converted(source, name="int8", **options):
    return into_memory(plan_conversion(source, name, **options), "cpu")


@pytest.mark.parametrize("name", FORMATS)
def test_each_quantized_layer_has_its_weight_scale_and_settings(checkpoint, state, name):
    made, format = converted(checkpoint, name), FORMATS[name]
    extra = {f"{layer}.{key}" for layer in QUANTIZED for key in ("weight_scale", "comfy_quant")}
    assert set(made) == set(state) | extra
    for layer in QUANTIZED:
        stored, scale = quantize(state[f"{layer}.weight"], format, "cpu")
        assert same_bits(made[f"{layer}.weight"], stored)
        assert same_bits(made[f"{layer}.weight_scale"], scale)
        settings = made[f"{layer}.comfy_quant"]
        assert settings.dtype is torch.uint8
        assert settings.ndim == 1
        assert json.loads(bytes(settings.tolist())) == format.settings(stored.shape[1], True)


def test_everything_else_stays_as_it_is(checkpoint, state):
    made = converted(checkpoint)
    for name in set(state) - {f"{layer}.weight" for layer in QUANTIZED}:
        assert same_bits(made[name], state[name])


@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_the_plan_says_what_is_made(checkpoint, state, name):
    conversion = plan_conversion(checkpoint, name)
    made = dict(convert(conversion, "cpu"))
    described = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in made.items()}
    assert conversion.outputs == described
    assert [*conversion.outputs] == [*made]
    assert conversion.nbytes == sum(tensor.nbytes for tensor in made.values())
    assert conversion.source_nbytes == sum(tensor.nbytes for tensor in state.values())
    if name != "none":
        kept = [state[key].nbytes for key in conversion.kept]
        assert sum(conversion.kept_nbytes.values()) == sum(kept)
        assert {*conversion.quantized, *conversion.kept} == set(state)


@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_file_memory_and_generator_agree(checkpoint, tmp_path, name):
    conversion = plan_conversion(checkpoint, name)
    path = into_file(conversion, tmp_path / "made.safetensors", "cpu")
    made = into_memory(conversion, "cpu")
    assert [*made] == [*conversion.outputs]
    assert all_same(load_file(path), made)
    assert all_same(dict(convert(conversion, "cpu")), made)


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_is_one_that_readers_know(checkpoint, tmp_path, name):
    path = into_file(plan_conversion(checkpoint, name), tmp_path / "made.safetensors", "cpu")
    facts = read_model(path)
    assert facts.quantization == KINDS[name]
    assert facts.block_lists == {"blocks": 3}
    report = inspect_file(path)
    assert not [issue for issue in report.issues if issue.fault]
    stored, _, begin = read_header(path)
    assert begin % 64 == 0
    assert all(tensor.start % 64 == 0 for tensor in stored if (tensor.end - tensor.start) % 64 == 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "someone"
    layers = json.loads(metadata["_quantization_metadata"])
    columns = {layer: 256 if layer.endswith("q") else 272 for layer in QUANTIZED}
    described = {layer: FORMATS[name].settings(count, True) for layer, count in columns.items()}
    assert layers == {"format_version": "1.0", "layers": described}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_is_a_source(tmp_path, dtype):
    state = wan_like(dtype)
    save_file(state, tmp_path / "wan.safetensors")
    made = converted(tmp_path / "wan.safetensors", "int8")
    for layer in QUANTIZED:
        stored, scale = quantize(state[f"{layer}.weight"], FORMATS["int8"], "cpu")
        assert same_bits(made[f"{layer}.weight"], stored)
        restored = dequantize(made[f"{layer}.weight"], scale, FORMATS["int8"], {})
        original = state[f"{layer}.weight"].float()
        assert (restored - original).norm() < 0.01 * original.norm()


def test_a_sharded_checkpoint_becomes_the_same_as_a_single_file(checkpoint, state, tmp_path):
    index = save_sharded(tmp_path / "shards", state)
    wanted = converted(checkpoint)
    assert all_same(converted(index), wanted)
    shards = sorted(index.parent.glob("*.safetensors"))
    assert all_same(converted(shards[1]), wanted)
    assert all_same(converted(shards), wanted)
    assert all_same(load_file(into_file(plan_conversion(index, "int8"), tmp_path / "one.safetensors", "cpu")), wanted)


def test_of_a_checkpoint_with_text_encoder_and_vae_only_the_transformer_is_taken(checkpoint, state, tmp_path):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    whole |= {"first_stage_model.decoder.weight": torch.randn(32, 32), "text.blocks.0.fc.weight": torch.randn(32, 32)}
    save_file(whole, tmp_path / "whole.safetensors", metadata={"author": "someone"})
    conversion = plan_conversion(tmp_path / "whole.safetensors", "int8")
    assert all_same(into_memory(conversion, "cpu"), converted(checkpoint))
    assert conversion.source_nbytes == sum(tensor.nbytes for tensor in state.values())


def test_the_older_layout_scales_every_linear_layer(checkpoint, state, tmp_path):
    conversion = plan_conversion(checkpoint, "fp8_e4m3fn", layout="scaled_fp8")
    made = load_file(into_file(conversion, tmp_path / "old.safetensors", "cpu"))
    linear = [name for name, tensor in state.items() if tensor.ndim == 2]
    scales = {f"{name.removesuffix('weight')}scale_weight" for name in linear}
    assert set(made) == set(state) | scales | {"scaled_fp8"}
    assert all(made[name].dtype is torch.float8_e4m3fn for name in linear)
    assert all(made[name].dtype is torch.float32 and made[name].shape == () for name in scales)
    # a layer of 24 columns suits no FP8 product: the mark has the two elements that say so
    assert (made["scaled_fp8"].dtype, len(made["scaled_fp8"])) == (torch.float8_e4m3fn, 2)
    assert read_model(tmp_path / "old.safetensors").quantization == "scaled FP8"


@pytest.mark.parametrize("tensor_cores", [True, False])
def test_the_mark_of_the_older_layout_says_how_to_compute(tmp_path, state, tensor_cores):
    save_file({name: tensor for name, tensor in state.items() if "odd" not in name}, tmp_path / "wan.safetensors")
    made = converted(tmp_path / "wan.safetensors", "fp8_e4m3fn", layout="scaled_fp8", tensor_cores=tensor_cores)
    assert len(made["scaled_fp8"]) == (0 if tensor_cores else 2)


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "int8"])
def test_dequantizing_layers_are_marked(checkpoint, name):
    made = converted(checkpoint, name, tensor_cores=False)
    settings = json.loads(bytes(made[f"{QUANTIZED[0]}.comfy_quant"].tolist()))
    assert settings["full_precision_matrix_mult"] is True


def test_a_quantized_checkpoint_passes_through_and_is_not_quantized_again(checkpoint, tmp_path):
    for name, layout in (("int8", "comfy_quant"), ("fp8_e4m3fn", "scaled_fp8")):
        path = into_file(plan_conversion(checkpoint, name, layout=layout), tmp_path / f"{name}.safetensors", "cpu")
        assert all_same(converted(path, "none"), load_file(path))
        with pytest.raises(AlreadyQuantized, match="already"):
            plan_conversion(path, "fp8_e4m3fn")


def test_names_in_passed_on_metadata_lose_the_prefix_too(tmp_path, checkpoint):
    made = converted(checkpoint)
    layers = {f"diffusion_model.{layer}": {"format": "int8_tensorwise"} for layer in QUANTIZED}
    listed = json.dumps({"format_version": "1.0", "layers": layers})
    prefixed = {f"diffusion_model.{name}": tensor for name, tensor in made.items() if "comfy_quant" not in name}
    save_file(prefixed, tmp_path / "q.safetensors", metadata={"_quantization_metadata": listed})
    conversion = plan_conversion(tmp_path / "q.safetensors", "none")
    assert [*json.loads(conversion.metadata["_quantization_metadata"])["layers"]] == QUANTIZED
    assert set(conversion.outputs) == {name.removeprefix("diffusion_model.") for name in prefixed}


def test_an_fp8_cast_without_scales_passes_through(tmp_path, state):
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    save_file(cast, tmp_path / "cast.safetensors")
    assert all_same(converted(tmp_path / "cast.safetensors", "none"), cast)
    with pytest.raises(AlreadyQuantized, match="without scales"):
        plan_conversion(tmp_path / "cast.safetensors", "int8")


def test_progress_and_measurements_are_told(checkpoint, state):
    seen, measured = [], {}
    conversion = plan_conversion(checkpoint, "int8_convrot")

    def measure(name, original, stored, scale, settings):
        assert torch.equal(original, state[name])
        measured[name] = (stored.dtype, tuple(scale.shape), settings.get("convrot", False))

    into_memory(conversion, "cpu", lambda done, total: seen.append((done, total)), measure)
    assert seen == sorted(seen)
    assert seen[-1] == (conversion.source_nbytes, conversion.source_nbytes)
    assert len(seen) == len(state)
    assert [*measured] == [*conversion.quantized]
    assert measured["blocks.0.self_attn.q.weight"] == (torch.int8, (32, 1), True)
    assert measured["blocks.0.ffn.0.weight"] == (torch.int8, (48, 1), False)


def test_a_tensor_of_many_pieces_and_empty_ones_are_read_whole(tmp_path, monkeypatch):
    from intelligent_vram.quant import staging

    monkeypatch.setattr(staging, "PIECE", 1000)
    monkeypatch.setattr(staging, "AHEAD", 3)
    state = {**wan_like(), "blocks.0.none": torch.empty(0, 4), "scalar": torch.tensor(3.5)}
    save_file(state, tmp_path / "wan.safetensors")
    made = converted(tmp_path / "wan.safetensors", "none")
    assert all_same(made, state)


def test_conversion_works_in_inference_mode(checkpoint, tmp_path):
    with torch.inference_mode():
        conversion = plan_conversion(checkpoint, "fp8_e4m3fn")
        path = into_file(conversion, tmp_path / "made.safetensors", "cpu")
        made = into_memory(conversion, "cpu")
    assert all_same(load_file(path), {name: tensor.clone() for name, tensor in made.items()})
