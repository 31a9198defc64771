"""What the header of a model's files says before loading is what the engine makes of the loaded model, to the byte."""

import json
import random
import re
import struct
import sys
import tracemalloc
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.cli.wan import WAN_14B, WanConfig, WanModel, meta_model
from intelligent_vram.vram import NoBlocks, SwapConfig, attach
from intelligent_vram.vram.discover import Scope
from intelligent_vram.vram.families import Sizes
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.model_headers import LONGEST_HEADER, ModelUnreadable
from intelligent_vram.vram.plan import MODES, cut
from safetensors.torch import load_file, save_file
from torch import nn

from ..host.checkpoints import write_hunyuan, write_wan
from ..host.wanvideo import write_quantized
from .counting import counted
from .models import CASES, STANDARD, WIDTH, AttentionBlock, Block, Transformer, TwoLists, build

TINY = WanConfig(dim=256, ffn_dim=640, num_heads=2, num_layers=5, text_dim=96)
SHORT = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
CODES = {**SHORT, torch.int64: "I64", torch.int8: "I8", torch.bool: "BOOL"}
KIB, MIB = 1 << 10, 1 << 20
BLOCK_SIZES = (200 * KIB, 1 * MIB, 300 * MIB)


def encode(header, **more):
    """A header of safetensors with its length before it."""
    encoded = header if isinstance(header, bytes) else json.dumps({**header, **more}).encode()
    return len(encoded).to_bytes(8, "little") + encoded


def describe(tensors):
    """The header of tensors in the order given, and the length of their data."""
    header, total = {}, 0
    for name, tensor in tensors.items():
        end = total + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [total, end]}
        total = end
    return header, total


def write_sparse(path, tensors):
    """A file with a real header, whose data takes no room on the disk."""
    header, total = describe(tensors)
    encoded = encode(header)
    with path.open("wb") as file:
        file.write(encoded)
        file.truncate(len(encoded) + total)
    return path


def shapes(**by_name):
    """bf16 tensors without memory, names with / for dots."""
    return {
        name.replace("/", "."): torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in by_name.items()
    }


def sizes_of(facts, config, **more):
    packed = facts.layers(config, **more)
    return [*packed.layers], packed.rest_bytes, [facts.prefix + path for path in packed.paths]


def sizes_attached(model, config, **more):
    swap = attach(model, config, "cpu", **more)
    result = swap.packed.sizes, swap.rest_bytes, [layer.layer.path for layer in swap.packed.layers]
    swap.detach()
    return result


def random_wan(config=TINY, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = WanModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype).eval()


# -- what the engine would make of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "block_size"), product(MODES, BLOCK_SIZES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layers_of_a_wan_file_are_those_of_the_attached_model(tmp_path, mode, block_size, dtype):
    model, config = random_wan(dtype=dtype), SwapConfig(mode=mode, block_size=block_size)
    save_file(model.state_dict(), tmp_path / "wan.safetensors")
    facts = read_model(tmp_path / "wan.safetensors")
    layers, rest, paths = sizes_of(facts, config)
    assert (layers, rest, paths) == sizes_attached(model, config)
    assert {layer.block for layer in layers} >= set(range(5))
    assert len(cut(layers, block_size)) == len(cut(sizes_attached(model, config)[0], block_size))


# a state dict tells neither which weights are tied, nor buffers that are made anew, nor a ParameterDict
TELLING = sorted({*CASES, *STANDARD} - {"tied weights", "blocks used twice", "buffers", "parameter lists"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TELLING)
def test_a_model_of_any_shape_is_known_from_its_file(tmp_path, name, mode):
    model = build(name)
    path = write_sparse(tmp_path / "model.safetensors", model.state_dict())
    for block_size in (1, 5 * KIB, 30 * KIB, MIB):
        config = SwapConfig(mode=mode, block_size=block_size)
        assert sizes_of(read_model(path), config) == sizes_attached(build(name), config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outside", [True, False])
def test_every_weight_is_packed_or_counted_beside(tmp_path, mode, outside):
    model, config = random_wan(), SwapConfig(mode=mode, block_size=MIB)
    save_file(model.state_dict(), tmp_path / "wan.safetensors")
    scope = Scope(outside=outside, leave=frozenset({"modulation"}))
    packed = read_model(tmp_path / "wan.safetensors").layers(config, scope=scope, compute_dtype=torch.float32)
    swap = attach(model, config, "cpu", scope=scope)
    inside = sum(spec.nbytes for layer in swap.packed.layers for entry in layer.entries for spec in entry.entry.specs)
    swap.detach()
    assert packed.beside_bytes == 2 * (
        sum(p.nbytes for p in model.parameters()) - inside
    )  # fp32, and the model in bf16


def test_two_lists_of_blocks_are_counted_in_order(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", TwoLists().state_dict())
    facts = read_model(path)
    assert facts.block_lists == {"double_blocks": 2, "single_blocks": 4}
    assert facts.blocks == tuple(f"double_blocks.{i}" for i in range(2)) + tuple(f"single_blocks.{i}" for i in range(4))
    block = sum(tensor.nbytes for tensor in Block().state_dict().values())
    assert facts.block_bytes == (block, block, *[4 * WIDTH * (WIDTH + 1)] * 4)
    assert facts.total_bytes - facts.inside_bytes == 4 * WIDTH * (WIDTH + 1)
    assert (facts.family, facts.sizes) == ("unknown", Sizes())
    assert facts.description == "Unknown family tiny, 6 blocks, fp32"


def test_ten_blocks_are_in_the_order_of_their_numbers(tmp_path):
    save_file(Transformer(count=12).state_dict(), tmp_path / "model.safetensors")  # sorted by name: 0, 1, 10, 11, 2
    facts = read_model(tmp_path / "model.safetensors")
    assert facts.blocks == tuple(f"blocks.{i}" for i in range(12))
    assert [layer.block for layer in facts.layers().layers] == sorted(layer.block for layer in facts.layers().layers)


def test_weights_that_a_file_sorts_by_name_still_add_up(tmp_path):
    model, config = Transformer(AttentionBlock), SwapConfig(block_size=20 * KIB)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layers, rest, paths = sizes_of(read_model(tmp_path / "model.safetensors"), config)
    wanted, wanted_rest, wanted_paths = sizes_attached(model, config)
    assert sorted(zip(paths, (layer.nbytes for layer in layers), strict=True)) == sorted(
        zip(wanted_paths, (layer.nbytes for layer in wanted), strict=True)
    )
    assert rest == wanted_rest


def test_a_file_is_planned_for_in_the_dtype_that_its_host_loads_it_in(tmp_path):
    save_file(random_wan(dtype=torch.float32).state_dict(), tmp_path / "wan.safetensors")
    facts, config = read_model(tmp_path / "wan.safetensors"), SwapConfig(block_size=MIB)
    assert sizes_of(facts, config, compute_dtype=torch.bfloat16) == sizes_attached(random_wan(), config)
    model = random_wan()
    model.patch_embedding.float()

    def dtype_of(name):
        return torch.float32 if name.startswith("patch_embedding") else None

    assert sizes_of(facts, config, compute_dtype=torch.bfloat16, dtype_of=dtype_of) == sizes_attached(model, config)
    assert sizes_of(facts, config) == sizes_attached(random_wan(dtype=torch.float32), config)


def test_a_host_that_keeps_what_is_outside_blocks_and_some_weights_is_planned_for(tmp_path):
    model, config = random_wan(), SwapConfig(block_size=MIB)
    scope = Scope(outside=False, leave=frozenset({"modulation"}))
    save_file(model.state_dict(), tmp_path / "wan.safetensors")
    assert sizes_of(read_model(tmp_path / "wan.safetensors"), config, scope=scope) == sizes_attached(
        model, config, scope=scope
    )


def test_a_host_may_define_modules_in_another_order(tmp_path):
    facts = read_model(write_wan(tmp_path / "vace.safetensors", blocks=4, vace_blocks=2, text_dim=64))
    assert facts.block_lists == {"blocks": 4, "vace_blocks": 2}
    usual = facts.layers(SwapConfig(block_size=1))
    other = facts.layers(SwapConfig(block_size=1), first=("vace_blocks",))
    assert usual.paths[0].startswith("blocks.0.")
    assert other.paths[0].startswith("vace_blocks.0.")
    assert usual.packed_bytes == other.packed_bytes


def test_block_lists_with_other_names_can_be_named(tmp_path):
    path = write_sparse(tmp_path / "m.safetensors", shapes(**{f"stages/{i}/up/weight": (512, 64) for i in range(3)}))
    facts = read_model(path)
    assert facts.blocks == ()
    assert "no blocks" in facts.description
    with pytest.raises(NoBlocks, match="Name its block lists"):
        facts.layers()
    assert [layer.block for layer in facts.layers(SwapConfig(block_names=("stages",))).layers] == [0, 1, 2]


# -- what is in the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_wan, write_hunyuan])
def test_the_bytes_of_a_checkpoint_add_up(tmp_path, write):
    path = write(tmp_path / "model.safetensors", text_dim=128)
    facts, tensors = read_model(path), load_file(path)
    assert facts.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert facts.bytes_by_dtype == {"bfloat16": facts.total_bytes}
    assert facts.parameters == sum(tensor.numel() for tensor in tensors.values())
    for block, nbytes in zip(facts.blocks, facts.block_bytes, strict=True):
        # HunyuanVideo's files name some parts of a block otherwise than the model does, but not the block
        assert nbytes == sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{block}."))
    assert facts.beside_bytes == 0


def test_wan_and_hunyuan_video_are_recognised_with_their_sizes(tmp_path):
    wan = read_model(write_wan(tmp_path / "wan.safetensors", text_dim=96))
    assert (wan.family, wan.quantization, wan.block_lists) == ("Wan", None, {"blocks": 6})
    assert wan.sizes == Sizes(256, 512, 2, 128, 96, 16, 16, (1, 2, 2))
    assert wan.description == "Wan 2.1/2.2 text-to-video tiny, 6 blocks, bf16"
    hunyuan = read_model(write_hunyuan(tmp_path / "hunyuan.safetensors", text_dim=96))
    assert hunyuan.block_lists == {
        "txt_in.individual_token_refiner.blocks": 2,
        "double_blocks": 2,
        "single_blocks": 4,
    }
    assert (hunyuan.family, hunyuan.sizes) == ("HunyuanVideo", Sizes(256, 1024, 2, 128, 96, 16, 16, (1, 2, 2)))


FLUX = {
    "img_in/weight": (3072, 64),
    "txt_in/weight": (3072, 4096),
    "double_blocks/0/img_attn/norm/key_norm/scale": (128,),
    "double_blocks/0/img_mlp/0/weight": (12288, 3072),
    "single_blocks/0/linear1/weight": (21504, 3072),
    "final_layer/linear/weight": (64, 3072),
}
KNOWN = {
    "Flux": (FLUX, Sizes(3072, 12288, 24, 128, 4096, 16, 16, (2, 2)), {"double_blocks": 1, "single_blocks": 1}),
    "Chroma": (
        {**FLUX, "distilled_guidance_layer/norms/0/scale": (5120,)},
        Sizes(3072, 12288, 24, 128, 4096, 16, 16, (2, 2)),
        {"double_blocks": 1, "single_blocks": 1},
    ),
    "Qwen-Image": (
        {
            "img_in/weight": (3072, 64),
            "txt_norm/weight": (3584,),
            "txt_in/weight": (3072, 3584),
            "transformer_blocks/0/attn/add_q_proj/weight": (3072, 3072),
            "transformer_blocks/0/attn/norm_q/weight": (128,),
            "transformer_blocks/0/img_mlp/net/0/proj/weight": (12288, 3072),
            "proj_out/weight": (64, 3072),
        },
        Sizes(3072, 12288, 24, 128, 3584, 16, 16, (2, 2)),
        {"transformer_blocks": 1},
    ),
    "LTX-Video": (
        {
            "adaln_single/emb/timestep_embedder/linear_1/bias": (2048,),
            "patchify_proj/weight": (2048, 128),
            "caption_projection/linear_1/weight": (2048, 4096),
            "transformer_blocks/0/attn2/to_k/weight": (2048, 2048),
            "transformer_blocks/0/ff/net/0/proj/weight": (8192, 2048),
            "proj_out/weight": (128, 2048),
        },
        Sizes(2048, 8192, 32, 64, 4096, 128, 128, (1, 1, 1)),
        {"transformer_blocks": 1},
    ),
    "Z-Image": (
        {
            "cap_embedder/1/weight": (3840, 2560),
            "noise_refiner/0/attention/k_norm/weight": (128,),
            "x_embedder/weight": (3840, 64),
            "layers/0/feed_forward/w1/weight": (10240, 3840),
            "final_layer/linear/weight": (64, 3840),
        },
        Sizes(3840, 10240, 30, 128, 2560, 16, 16, (2, 2)),
        {"layers": 1},
    ),
    "SD3": (
        {
            "joint_blocks/0/context_block/attn/qkv/weight": (7296, 2432),
            "x_embedder/proj/weight": (2432, 16, 2, 2),
            "joint_blocks/0/x_block/mlp/fc1/weight": (9728, 2432),
            "context_embedder/weight": (2432, 4096),
            "final_layer/linear/weight": (64, 2432),
        },
        Sizes(2432, 9728, 38, 64, 4096, 16, 16, (2, 2)),
        {},
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("family", KNOWN)
def test_families_are_recognised_by_the_names_of_their_weights(tmp_path, family, prefix):
    weights, sizes, lists = KNOWN[family]
    tensors = {prefix + name: tensor for name, tensor in shapes(**weights).items()}
    facts = read_model(write_sparse(tmp_path / "model.safetensors", tensors))
    assert (facts.family, facts.sizes, facts.block_lists, facts.prefix) == (family, sizes, lists, prefix)


def test_a_checkpoint_with_its_vae_and_text_encoder_is_taken_for_its_transformer(tmp_path):
    wan = random_wan().state_dict()
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in wan.items()}
    whole |= {
        "first_stage_model.decoder.blocks.0.weight": torch.ones(100),
        "text_encoders.t5.layers.0.w": torch.ones(7),
    }
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(wan, tmp_path / "alone.safetensors")
    facts, alone = read_model(tmp_path / "whole.safetensors"), read_model(tmp_path / "alone.safetensors")
    assert facts.beside_bytes == 107 * 4
    assert facts.total_bytes == alone.total_bytes
    assert facts.layers() == alone.layers()


def test_scaled_fp8_is_recognised_and_its_scales_stay_fp32(tmp_path):
    plain = write_wan(tmp_path / "plain.safetensors", text_dim=64, dtype=torch.float32)
    facts = read_model(write_quantized(tmp_path / "fp8.safetensors", plain))
    assert facts.quantization == "scaled FP8"
    assert facts.description == "Wan 2.1/2.2 text-to-video tiny, 6 blocks, scaled FP8"
    tensors = load_file(tmp_path / "fp8.safetensors")
    assert facts.bytes_by_dtype["float8_e4m3fn"] == sum(
        tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn
    )
    assert facts.parameters == sum(tensor.numel() for tensor in load_file(plain).values())
    q = "blocks.0.self_attn.q"
    packed = facts.layers(SwapConfig(block_size=1), compute_dtype=torch.bfloat16)
    size = packed.layers[packed.paths.index(q)].nbytes
    assert size == 256 * 256 + 512 + 512  # the weight, the bias in bf16, the scale: each aligned to 512
    outside = facts.layers(SwapConfig(mode="layerwise"), compute_dtype=torch.bfloat16)
    assert "scaled_fp8" not in outside.paths


def test_kinds_of_wan_are_told_apart(tmp_path):
    wan = {name: tensor.to("meta") for name, tensor in meta_model(TINY).state_dict().items()}

    def kind(**more):
        return read_model(write_sparse(tmp_path / "m.safetensors", {**wan, **shapes(**more)})).description

    assert "text-to-video" in kind()
    assert "image-to-video" in kind(**{"img_emb/proj/0/bias": (1280,)})
    assert "2.2 image-to-video" in kind(**{"patch_embedding/weight": (256, 36, 1, 2, 2)})
    assert "VACE" in kind(**{"vace_patch_embedding/weight": (256, 96, 1, 2, 2), "img_emb/proj/0/bias": (9,)})


# -- sets of files, GGUF ------------------------------------------------------------------------------------------------


def write_shards(folder, tensors, count=3):
    """A set of files with its index. Returns the index."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts = [dict([*tensors.items()][i::count]) for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_set_of_files_is_the_same_model_by_its_index_any_of_them_or_a_list(tmp_path):
    tensors = random_wan().state_dict()
    save_file(tensors, tmp_path / "whole.safetensors")
    index = write_shards(tmp_path, tensors)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = read_model(tmp_path / "whole.safetensors")
    for given_paths in (index, str(shards[1]), shards, shards[::-1], shards[:2]):
        facts = read_model(given_paths)
        assert len(facts.paths) == 3
        assert facts.layers() == whole.layers()
        assert (facts.total_bytes, facts.block_bytes) == (whole.total_bytes, whole.block_bytes)


def test_a_missing_file_of_a_set_is_named(tmp_path):
    index = write_shards(tmp_path, random_wan().state_dict())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    for path in (index, tmp_path / "model-00001-of-00003.safetensors"):
        with pytest.raises(ModelUnreadable, match=r"1 of the 3 files .*model-00002-of-00003\.safetensors first"):
            read_model(path)


def test_files_of_two_models_are_not_taken_for_one(tmp_path):
    for name in "ab":
        save_file(random_wan().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelUnreadable, match=r"b\.safetensors: its weight .* is in a\.safetensors too"):
        read_model([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../../outside.safetensors"}, "names .safetensors files beside it"),
        ({"a": "/etc/passwd"}, "names .safetensors files beside it"),
        ({"a": "C:\\model.safetensors"}, "names .safetensors files beside it"),
        ({"a": 3}, "names .safetensors files beside it"),
        ({"a": ["x.safetensors"]}, "no index"),
        ({}, "names 0 files"),
        ([], "no index"),
        ({str(i): f"{i}.safetensors" for i in range(2000)}, "names 2000 files"),
    ],
)
def test_an_index_cannot_name_what_it_likes(tmp_path, weight_map, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelUnreadable, match=message):
        read_model(path)


def test_gguf_is_read_as_its_own_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    plain = write_wan(tmp_path / "plain.safetensors", text_dim=64, dtype=torch.float32)
    path = write_quantized(tmp_path / "q8.gguf", plain)
    facts = read_model(path)
    assert {weight.name: weight.nbytes for weight in facts.weights} == {
        tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors
    }
    assert {weight.name: weight.shape for weight in facts.weights} == {
        name: tuple(tensor.shape) for name, tensor in load_file(plain).items()
    }
    assert (facts.family, facts.quantization, facts.sizes) == ("Wan", "GGUF Q8_0", read_model(plain).sizes)
    assert facts.parameters == read_model(plain).parameters
    layers = facts.layers(SwapConfig(block_size=1), compute_dtype=torch.float16)
    assert layers.layers[layers.paths.index("blocks.0.ffn.0")].nbytes == 512 * 256 // 32 * 34 + 1024


def test_gguf_metadata_is_passed_by_and_keeps_shapes_that_gguf_cannot_hold(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_string("some.text", "x" * 1000)
    writer.add_bool("some.flag", True)
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [8, 4, 1, 2, 2])
    writer.add_custom_alignment(64)
    writer.add_tensor("patch_embedding.weight", torch.zeros(8, 16).numpy())
    writer.add_tensor("blocks.0.ffn.0.weight", torch.zeros(32, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = read_model(tmp_path / "m.gguf")
    assert [(w.name, w.dtype, w.shape, w.nbytes) for w in facts.weights] == [
        ("patch_embedding.weight", "float32", (8, 4, 1, 2, 2), 512),
        ("blocks.0.ffn.0.weight", "float32", (32, 8), 1024),
    ]


def test_without_the_gguf_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelUnreadable, match=r"m\.gguf: .*pip install gguf"):
        read_model(tmp_path / "m.gguf")


# -- time and memory ----------------------------------------------------------------------------------------------------


def test_a_file_of_28_gb_is_planned_for_in_little_memory(tmp_path):
    tensors = {
        name: torch.empty_like(p, dtype=torch.bfloat16) for name, p in sorted(meta_model(WAN_14B).state_dict().items())
    }
    path = write_sparse(tmp_path / "wan.safetensors", tensors)
    assert path.stat().st_size > 28 * 1000**3

    def plan():
        facts = read_model(path)
        packed = facts.layers(SwapConfig())
        return facts, cut(packed.layers, 300 * MIB)

    facts, units = plan()  # also imports what is not imported yet
    assert facts.description == "Wan 2.1/2.2 text-to-video 14B, 40 blocks, bf16"
    assert facts.sizes == Sizes(5120, 13824, 40, 128, 4096, 16, 16, (1, 2, 2))
    assert len(units) == 120
    assert len(set(facts.block_bytes)) == 1
    tracemalloc.start()
    plan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MIB


# -- files that are not what they should be -----------------------------------------------------------------------------

ONE = {"blocks.0.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
DATA = bytes(16)


def one(**changes):
    return encode({"blocks.0.w": {**ONE["blocks.0.w"], **changes}}) + DATA


HOSTILE = {
    "empty": (b"", "not a safetensors file"),
    "three bytes": (b"abc", "not a safetensors file"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a length of 2**63": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
    "a header of 20 MiB": (struct.pack("<Q", 20 * MIB) + b" " * (20 * MIB + 8), "20.0 MiB long"),
    "cut off in its header": (encode(ONE)[:30], "ends inside its header"),
    "cut off in its data": (encode(ONE) + DATA[:9], "cut off"),
    "no JSON": (encode(b"not json"), "header is not one of safetensors"),
    "no UTF-8": (encode(b'{"\xff\xfe": 3}'), "header is not one of safetensors"),
    "a list": (encode(b"[1, 2]"), "header is not one of safetensors"),
    "a number": (encode(b"7"), "header is not one of safetensors"),
    "nothing in it": (encode(b"{}"), "no weights"),
    "only metadata": (encode(b'{"__metadata__": {"format": "pt"}}'), "no weights"),
    "deep nesting": (encode(b"[" * 200_000 + b"]" * 200_000), "header is not one of safetensors"),
    "deep nesting of objects": (encode(b'{"a":' * 100_000), "header is not one of safetensors"),
    "millions of items": (encode(b"[" + b"1," * 2_000_000 + b"1]"), "2000001 items"),
    "millions of empty objects": (encode(b"[" + b"{}," * 2_000_000 + b"1]"), "items"),
    "a name twice": (encode(b'{"a":%s,"a":%s}' % ((json.dumps(ONE["blocks.0.w"]).encode(),) * 2)) + DATA, "twice"),
    "no dtype": (encode({"a": {"shape": [1], "data_offsets": [0, 4]}}) + DATA, "header is not one of safetensors"),
    "an unknown dtype": (one(dtype="F5"), "none of safetensors'"),
    "a negative shape": (one(shape=[-2, -2]), "impossible shape"),
    "a negative number": (one(shape=[-4]), "impossible shape"),
    "a huge shape": (one(shape=[2**40, 2**40]), "impossible shape"),
    "a huge shape of nothing": (one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "impossible shape"),
    "a shape that does not fit": (one(shape=[3, 3]), "do not fit"),
    "a shape of infinity": (one(shape=[float("inf")]), "header is not one of safetensors"),
    "a shape of not a number": (one(shape=[float("nan")]), "header is not one of safetensors"),
    "a shape of a thousand dimensions": (one(shape=[1] * 1000), "1000 dimensions"),
    "offsets backwards": (one(data_offsets=[16, 0]), "do not fit"),
    "negative offsets": (one(data_offsets=[-16, 0]), "do not fit"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "header is not one of safetensors"),
    "offsets of text": (one(data_offsets=["0", "16"]), "header is not one of safetensors"),
    "offsets of fractions": (one(data_offsets=[0.0, 16.0]), "no whole number"),
    "data that is far away": (one(data_offsets=[2**62, 2**62 + 16]), "cut off"),
    "a number of 4000 digits": (
        encode(b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 4000)),
        "64 bits",
    ),
    "an offset that is true": (one(data_offsets=[False, 16]), "no whole number"),
    "weights that overlap": (
        encode({"a": ONE["blocks.0.w"], "b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}}) + bytes(24),
        "share bytes",
    ),
    "a name without end": (encode({"x" * 100_000: ONE["blocks.0.w"]}) + DATA, "100000 characters"),
    "a name of many parts": (encode({".".join("a" * 200): ONE["blocks.0.w"]}) + DATA, "399 characters"),
    "an empty name": (encode({"": ONE["blocks.0.w"]}) + DATA, "0 characters"),
}


def refused(path):
    """The message of a refusal that took little work and memory, and is short."""
    tracemalloc.start()
    with pytest.raises(ModelUnreadable) as refusal, counted() as lines:
        read_model(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines() < 10_000
    assert peak < 40 * MIB
    assert len(str(refusal.value)) < 1000
    assert str(path) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused_at_once_with_what_is_wrong(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert re.search(re.escape(message), refused(path))


def test_the_longest_header_that_is_read_takes_bounded_memory(tmp_path):
    longest = b'{"__metadata__":{"x":"%s"}}' % (b"y" * (LONGEST_HEADER - 28))
    path = tmp_path / "long.safetensors"
    path.write_bytes(encode(longest))
    assert "no weights" in refused(path)


def test_what_is_no_model_file_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    (tmp_path / "model.txt").write_bytes(b"hello")
    for name, message in {
        "nothing.safetensors": "no such file",
        "model.ckpt": "convert it to safetensors",
        "model.txt": "neither a .safetensors nor a .gguf",
        ".": "it is a folder|neither",
        "nothing.safetensors.index.json": "could not be read",
    }.items():
        assert re.search(message, refused(tmp_path / name))
    with pytest.raises(ModelUnreadable, match="no file was given"):
        read_model([])


def gguf_file(*, tensors=(), count=None, fields=b"", field_count=0, magic=b"GGUF", version=3, data=b""):
    infos = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, start)
        for name, shape, kind, start in tensors
    )  # fmt: skip
    head = magic + struct.pack("<IQQ", version, len(tensors) if count is None else count, field_count) + fields + infos
    return head + bytes(-len(head) % 32) + data


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


HOSTILE_GGUF = {
    "empty": (b"", "ends inside its header"),
    "something else": (gguf_file(magic=b"GGML"), "no GGUF file"),
    "an old version": (gguf_file(version=1), "version 1"),
    "big-endian": (gguf_file(version=3 << 24), "version"),
    "2**60 weights": (gguf_file(count=2**60), "claims to hold"),
    "2**60 fields": (gguf_file(field_count=2**60), "claims to hold"),
    "more weights than bytes": (gguf_file(count=40_000), "ends inside its header"),
    "a name without end": (gguf_file(count=1, fields=struct.pack("<Q", 2**62)), "ends inside its header"),
    "an array without end": (
        gguf_file(field_count=1, fields=gguf_text(b"a") + struct.pack("<IIQ", 9, 4, 2**61)),
        "ends inside its header",
    ),
    "an array of arrays": (
        gguf_file(field_count=1, fields=gguf_text(b"a") + struct.pack("<IIQ", 9, 9, 2)),
        "array of type 9",
    ),
    "metadata of no type": (gguf_file(field_count=1, fields=gguf_text(b"a") + struct.pack("<I", 99)), "type 99"),
    "2**31 dimensions": (
        gguf_file(count=1, fields=gguf_text(b"a") + struct.pack("<I", 2**31)),
        "2147483648 dimensions",
    ),
    "a huge shape": (gguf_file(tensors=[(b"a", (2**62, 2**62), 0, 0)]), "impossible shape"),
    "an unknown type": (gguf_file(tensors=[(b"a", (4,), 9999, 0)]), "pip install -U gguf"),
    "part of a block": (gguf_file(tensors=[(b"a", (33,), 8, 0)]), "no whole number of blocks"),
    "a name twice": (gguf_file(tensors=[(b"a", (4,), 0, 0), (b"a", (4,), 0, 32)], data=bytes(64)), "twice"),
    "cut off in its data": (gguf_file(tensors=[(b"a", (4,), 0, 0)], data=bytes(15)), "1 bytes behind it"),
    "weights that overlap": (
        gguf_file(tensors=[(b"a", (4,), 0, 0), (b"b", (4,), 0, 8)], data=bytes(64)),
        "too early",
    ),
    "an alignment of zero": (
        gguf_file(field_count=1, fields=gguf_text(b"general.alignment") + struct.pack("<II", 4, 0)),
        "no power of two",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_a_bad_gguf_file_is_refused_at_once_with_what_is_wrong(tmp_path, name):
    pytest.importorskip("gguf")
    content, message = HOSTILE_GGUF[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert message in refused(path)


def test_a_gguf_header_without_end_in_a_large_file_is_left_early(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "zeros.gguf"
    with path.open("wb") as file:
        array = gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 2**40)  # of 2**40 texts, each empty
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + array)
        file.truncate(28 * 1000**3)
    with pytest.raises(ModelUnreadable, match="more than 500000 names and texts"), counted() as lines:
        read_model(path)
    assert lines() < 20_000_000  # 16 for each that is read


@given(seed=st.integers(0, 2**32), gguf=st.booleans())
def test_damage_anywhere_in_a_header_is_refused_or_harmless(tmp_path_factory, seed, gguf):
    damage = random.Random(seed)
    path = tmp_path_factory.mktemp("damaged") / ("m.gguf" if gguf else "m.safetensors")
    if gguf:
        pytest.importorskip("gguf")
        whole = gguf_file(
            tensors=[(b"blocks.0.w", (64, 4), 8, 0), (b"blocks.1.w", (4,), 0, 288)],
            fields=gguf_text(b"general.alignment") + struct.pack("<II", 4, 32),
            field_count=1,
            data=bytes(320),
        )
    else:
        whole = encode(describe(Transformer(count=2).state_dict())[0]) + bytes(200_000)
    content = bytearray(whole)
    for _ in range(damage.randint(1, 4)):
        content[damage.randrange(min(len(content), 1500))] = damage.randrange(256)
    path.write_bytes(content[: damage.choice([len(content), damage.randrange(len(content))])])
    try:
        facts, message = read_model(path), ""
    except ModelUnreadable as error:
        facts, message = None, str(error)
    if facts is None:
        assert str(path) in message
        return
    assert facts.total_bytes + facts.beside_bytes <= len(content)
    assert facts.description
    if facts.blocks:
        packed = facts.layers(SwapConfig(mode="layerwise"))
        assert packed.packed_bytes + packed.rest_bytes >= facts.inside_bytes
