"""Which layers are quantized: those of the blocks, but for what the pattern names."""

import pytest
import torch
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.select import DEFAULT_KEEP, _compiled, choose, choose_all
from intelligent_vram.vram.model_facts import facts_of_tensors

from .conftest import BLOCKS, QUANTIZED

FP8 = FORMATS["fp8_e4m3fn"]


def facts_of(*names, shape=(32, 32), dtype=torch.bfloat16):
    return facts_of_tensors({name: torch.empty(shape, dtype=dtype, device="meta") for name in names})


def layers(choice):
    return [name.removesuffix(".weight") for name in choice.quantized]


def test_every_weight_is_quantized_or_kept_for_a_reason(state):
    choice = choose(facts_of_tensors(state), FP8)
    assert sorted(layers(choice)) == sorted(QUANTIZED)
    assert {*choice.quantized, *choice.kept} == set(state)
    assert "outside the blocks" in choice.kept["head.head.weight"]
    assert "no weight of a linear layer" in choice.kept["blocks.0.norm3.weight"]
    assert "no weight of a linear layer" in choice.kept["blocks.0.modulation"]
    assert "multiples of 16" in choice.kept["blocks.0.cross_attn.odd.weight"]


@pytest.mark.parametrize(
    "layer",
    [
        "transformer_blocks.0.img_mod.1",
        "double_blocks.0.img_mod.lin",
        "single_blocks.0.modulation.lin",
        "layers.0.adaLN_modulation.1",
        "transformer_blocks.0.norm1.linear",
        "distilled_guidance_layer.layers.0.in_layer",
        "noise_refiner.layers.0.attention.qkv",
        "blocks.0.token_embedder",
    ],
)
def test_modulation_norms_and_embeddings_in_blocks_are_kept(layer):
    other = layer.partition(".0.")[0] + ".0.mlp.2.weight"
    choice = choose(facts_of(f"{layer}.weight", other), FP8)
    assert "pattern" in choice.kept[f"{layer}.weight"]
    assert f"{layer}.weight" in choose(facts_of(f"{layer}.weight", other), FP8, keep=None).quantized


@pytest.mark.parametrize(
    "layer",
    [
        "blocks.0.self_attn.q",
        "blocks.0.ffn.0",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.txt_mlp.2",
        "single_blocks.0.linear1",
        "transformer_blocks.0.attn.to_out.0",
        "layers.0.feed_forward.w1",
    ],
)
def test_attention_and_feed_forward_are_quantized(layer):
    assert layers(choose(facts_of(f"{layer}.weight"), FP8)) == [layer]


def test_first_and_last_blocks_of_each_list_can_be_kept(state):
    choice = choose(facts_of_tensors(state), FP8, first_last=1)
    assert layers(choice) == [layer for layer in QUANTIZED if layer.startswith("blocks.1.")]
    assert "first or last block" in choice.kept["blocks.2.ffn.0.weight"]
    assert not choose(facts_of_tensors(state), FP8, first_last=BLOCKS).quantized
    two = facts_of(*(f"{kind}_blocks.{n}.fc.weight" for kind in ("double", "single") for n in range(3)))
    assert layers(choose(two, FP8, first_last=1)) == ["double_blocks.1.fc", "single_blocks.1.fc"]


def test_the_pattern_can_be_edited(state):
    choice = choose(facts_of_tensors(state), FP8, keep=r"ffn|blocks\.2\.")
    assert layers(choice) == ["blocks.0.self_attn.q", "blocks.1.self_attn.q"]
    assert (
        choose(facts_of_tensors(state), FP8, keep="").quantized == choose(facts_of_tensors(state), FP8, None).quantized
    )


def test_a_pattern_that_is_none_is_an_error_in_words(state):
    with pytest.raises(ValueError, match=r"'\(ffn', is no regular expression"):
        choose(facts_of_tensors(state), FP8, keep="(ffn")
    assert DEFAULT_KEEP


def test_integers_in_blocks_are_kept():
    choice = choose(facts_of("blocks.0.a.weight", dtype=torch.int32), FP8)
    assert "float" in choice.kept["blocks.0.a.weight"]


def test_the_older_layout_takes_all_linear_layers_and_no_table():
    names = ("blocks.0.norm_out.linear.weight", "head.weight", "token_embedding.weight", "text_embedding.0.weight")
    choice = choose_all(facts_of(*names, "blocks.0.fc.bias"))
    assert choice.quantized == (names[0], names[1], names[3])
    assert "table" in choice.kept["token_embedding.weight"]


@pytest.mark.parametrize("keep", ["(a+)+$", "(.*.*)*x$", "a*b*c*d*e", "(" * 3000, "a{99999999999999999999}", "("])
def test_patterns_that_are_none_or_could_take_for_ever_are_refused(keep):
    with pytest.raises(ValueError, match="pattern of what to keep"):
        _compiled(keep)


@pytest.mark.parametrize(
    "keep", [DEFAULT_KEEP, r"blocks\.\d+\.attn.*(q|k)\..*", "x|y.*|z+|a.*b.*", r"blocks\.(0|39)\."]
)
def test_patterns_that_people_write_are_taken(keep):
    assert _compiled(keep) is not None
