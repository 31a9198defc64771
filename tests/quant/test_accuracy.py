"""What a user relies on in the accuracy report: right figures, warnings where they are due, and a readable picture."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intelligent_vram.quant.accuracy import NEGLIGIBLE, SLICE, Accuracy, Error, ErrorSum, error, keep_pattern
from intelligent_vram.quant.accuracy_picture import WIDTH, maps_of, shade
from intelligent_vram.quant.convert import convert, plan_conversion
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.quantize import quantize
from safetensors.torch import save_file

# the same examples on every run, wherever other tests have set hypothesis to
examples = settings(deadline=None, derandomize=True, database=None, max_examples=30)
seeds = st.integers(0, 2**31)
float_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def err(relative: float) -> Error:
    """An error of that size."""
    return Error(relative, math.nan if math.isnan(relative) else 1 - min(2.0, relative) / 2, relative)


def model(blocks: int = 8, relative: float = 0.026, **bad: float) -> Accuracy:
    """A model of one format with the same error in all layers but the named, ``blocks_3_ffn_0=0.2``."""
    accuracy = Accuracy()
    for block in range(blocks):
        for kind, columns in (("self_attn.q", 256), ("ffn.0", 512)):
            name = f"blocks.{block}.{kind}"
            found = bad.get(name.replace(".", "_"), relative * (1 + 0.01 * block))
            accuracy.record(f"{name}.weight", (256, columns), "fp8_e4m3fn", err(found))
    return accuracy


# -- figures --------------------------------------------------------------------------------------------------------------


def test_an_error_has_the_figures_that_one_gets_by_hand() -> None:
    found = error(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert found.relative == pytest.approx(1 / 5)
    assert found.snr_db == pytest.approx(20 * math.log10(5))
    assert found.cosine == pytest.approx(25 / (5 * math.sqrt(26)))
    assert found.worst == 1.0


def test_the_opposite_has_twice_the_size_as_error() -> None:
    found = error(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]))
    assert (found.relative, found.cosine, found.worst) == (pytest.approx(2.0), pytest.approx(-1.0), 4.0)
    assert found.snr_db == pytest.approx(-6.0206, abs=1e-4)


@examples
@given(seeds, float_dtypes)
def test_equal_tensors_have_no_error(seed: int, dtype: torch.dtype) -> None:
    tensor = randn(seed, 7, 9).to(dtype)
    found = error(tensor.clone(), tensor)
    assert found == Error(0.0, 1.0, 0.0)
    assert found.snr_db == math.inf


@examples
@given(seeds, st.integers(-40, 40))
def test_the_relative_error_does_not_depend_on_scale(seed: int, power: int) -> None:
    reference, noise = randn(seed, 33, 5), randn(seed + 1, 33, 5) * 0.01
    factor = 2.0**power
    plain, scaled = error(reference + noise, reference), error((reference + noise) * factor, reference * factor)
    assert scaled.relative == pytest.approx(plain.relative, rel=1e-12)
    assert scaled.cosine == pytest.approx(plain.cosine, rel=1e-12)
    assert scaled.worst == pytest.approx(plain.worst * factor, rel=1e-12)


@examples
@given(seeds, float_dtypes, float_dtypes)
def test_it_agrees_with_the_definition_whatever_the_dtypes(seed: int, first: torch.dtype, second: torch.dtype) -> None:
    result, reference = randn(seed, 20, 10).to(first), randn(seed + 1, 20, 10).to(second)
    a, b = result.double(), reference.double()
    found = error(result, reference)
    assert found.relative == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-12)
    assert found.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item(), rel=1e-9)
    assert found.worst == (a - b).abs().max().item()


@examples
@given(seeds, st.lists(st.integers(1, 19), max_size=4))
def test_parts_together_have_the_error_of_the_whole(seed: int, cuts: list[int]) -> None:
    result, reference = randn(seed, 20, 6), randn(seed + 1, 20, 6)
    whole, parts = error(result, reference), ErrorSum()
    for start, end in pairwise([0, *sorted(cuts), 20]):
        parts.add(result[start:end], reference[start:end])
    found = parts.error()
    assert found.relative == pytest.approx(whole.relative, rel=1e-12)
    assert found.worst == whole.worst


def test_sums_of_many_elements_stay_exact() -> None:
    reference = torch.full((3 * SLICE + 17,), 0.1)
    result = reference.clone()
    result[-1] += 1.0
    found = error(result, reference)
    expected = (result[-1].double() - reference[-1].double()).item()
    assert found.relative == pytest.approx(expected / (0.1 * math.sqrt(len(reference))), rel=1e-6)
    assert found.worst == expected


def test_strides_do_not_matter() -> None:
    result, reference = randn(0, 8, 12), randn(1, 8, 12)
    assert error(result.t(), reference.t()).relative == pytest.approx(error(result, reference).relative, rel=1e-12)
    assert error(result.t().contiguous(), reference.t()).worst == error(result, reference).worst


def test_fp8_tensors_are_compared_by_value() -> None:
    weight = randn(0, 64, 64)
    stored = weight.to(torch.float8_e4m3fn)
    assert error(stored, weight) == error(stored.float(), weight)
    assert 0.02 < error(stored, weight).relative < 0.03


@pytest.mark.parametrize(
    ("result", "reference", "relative", "cosine"),
    [(0.0, 0.0, 0.0, 1.0), (1.0, 0.0, math.inf, 0.0), (0.0, 1.0, 1.0, 0.0)],
)
def test_zeros_have_an_error_too(result: float, reference: float, relative: float, cosine: float) -> None:
    found = error(torch.full((4, 4), result), torch.full((4, 4), reference))
    assert (found.relative, found.cosine) == (relative, cosine)
    assert found.snr_db == {0.0: math.inf, math.inf: -math.inf, 1.0: 0.0}[relative]


def test_nothing_has_no_error() -> None:
    assert error(torch.empty(0, 4), torch.empty(0, 4)) == ErrorSum().error() == Error(0.0, 1.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_has_no_number(value: float, both: bool) -> None:
    result, reference = randn(0, 4, 4), randn(0, 4, 4)
    result[1, 2] = value
    if both:
        reference[1, 2] = value
    found = error(result, reference)
    assert all(map(math.isnan, (found.relative, found.cosine, found.worst, found.snr_db)))
    assert "NaN or Inf" in found.describe()


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[3, 2\]"):
        error(torch.zeros(2, 3), torch.zeros(3, 2))


# -- layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("blocks.3.self_attn.q.weight", ("blocks", 3, "self_attn.q")),
        ("model.diffusion_model.double_blocks.11.img_mlp.0", ("double_blocks", 11, "img_mlp.0")),
        ("a.refiner.blocks.1.mlp.0.weight", ("a.refiner.blocks", 1, "mlp.0")),
        ("diffusion_model.head.head.weight", (None, None, "head.head")),
        ("text_embedding.0", (None, None, "text_embedding.0")),
    ],
)
def test_a_layer_knows_its_place(name: str, where: tuple) -> None:
    accuracy = Accuracy()
    accuracy.record(name, (4, 6), "int8", err(0.1))
    (layer,) = accuracy.layers
    assert (layer.list_name, layer.block, layer.kind) == where
    assert (layer.rows, layer.columns, layer.share) == (4, 6, 1.0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows_slice", [1 << 22, 5 * 512])
def test_converted_weights_have_the_error_of_their_format(
    name: str, rows_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intelligent_vram.quant.accuracy.ROWS_SLICE", rows_slice)
    weight, chosen = randn(0, 64, 512).to(torch.bfloat16), FORMATS[name]
    stored, scale = quantize(weight, chosen, "cpu")
    accuracy = Accuracy()
    accuracy.add("blocks.0.ffn.0.weight", weight, stored, scale, chosen.settings(512, tensor_cores=True))
    (layer,) = accuracy.layers
    assert layer.format == name
    low, high = {"fp8_e4m3fn": (0.02, 0.03), "fp8_e5m2": (0.04, 0.06)}.get(name, (0.005, 0.012))
    assert low < layer.error.relative < high


def test_a_conversion_measures_what_it_makes_and_keeps_what_the_pattern_names(tmp_path: Path) -> None:
    weights = {f"blocks.{block}.ffn.0.weight": randn(block, 64, 256) for block in range(6)}
    save_file(weights, tmp_path / "model.safetensors")

    def measured(keep: str | None) -> Accuracy:
        accuracy = Accuracy()
        conversion = plan_conversion(tmp_path / "model.safetensors", "fp8_e4m3fn", keep=keep)
        assert len(dict(convert(conversion, "cpu", measured=accuracy.add))) >= len(weights)
        return accuracy

    assert [layer.name for layer in measured(None).layers] == [f"blocks.{block}.ffn.0" for block in range(6)]
    kept = measured(keep_pattern(measured(None).layers[2:4]))
    assert [layer.block for layer in kept.layers] == [0, 1, 4, 5]


def test_settings_of_no_known_format_are_refused() -> None:
    with pytest.raises(ValueError, match="int9"):
        Accuracy().add("a", torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(()), {"format": "int9"})


def test_shares_are_of_all_weights() -> None:
    shares = [layer.share for layer in model().layers]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == pytest.approx(2 * shares[0])


# -- table ----------------------------------------------------------------------------------------------------------------


def test_the_table_names_every_kind_and_the_worst_ten() -> None:
    accuracy = model(blocks_3_ffn_0=0.2)
    accuracy.record("head.head.weight", (64, 256), "bfloat16", err(0.0))
    lines = accuracy.table()
    assert lines[0].startswith("16 layers fp8_e4m3fn, ")
    assert "20% at worst (blocks.3.ffn.0)" in lines[0]
    assert lines[1] == "1 layer equal to the bit"
    (kind,) = [line for line in lines if line.startswith("blocks.*.self_attn.q")]
    assert re.search(r"fp8_e4m3fn +8 .*33% +2\.7% +2\.78%", kind)
    start = next(index for index, line in enumerate(lines) if line.startswith("worst layers"))
    worst = lines[start + 1 :]
    assert len(worst) == 10
    assert worst[0].split()[:5] == ["blocks.3.ffn.0", "fp8_e4m3fn", "256", "x", "512"]
    assert not any(line.startswith("head.head") for line in lines)


def test_tables_of_nothing_and_of_equal_layers_say_so() -> None:
    assert Accuracy().table() == ["No layer was compared."]
    assert model(relative=0.0).table() == ["16 layers equal to the bit"]


# -- warnings -------------------------------------------------------------------------------------------------------------


def test_a_bad_layer_is_warned_of_with_a_pattern_that_keeps_just_it() -> None:
    accuracy = model(blocks=12, blocks_1_ffn_0=0.2, blocks_11_ffn_0=0.1)
    line, rule = accuracy.warnings()
    assert "blocks.*.ffn.0 suffers in 2 blocks (1, 11): relative error up to 20%" in line
    assert "2 times the median" in rule
    pattern = line.partition("add to keep_high_precision, with a | between: ")[2]
    kept = [layer.name for layer in accuracy.layers if re.search(pattern, layer.name)]
    assert kept == ["blocks.1.ffn.0", "blocks.11.ffn.0"]
    assert re.search(pattern, "diffusion_model.blocks.1.ffn.0")
    assert not re.search(pattern, "vace_blocks.1.ffn.0")


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_with_a_wrong_scale_is_found_among_good_ones(name: str) -> None:
    accuracy, chosen = Accuracy(), FORMATS[name]
    for block in range(6):
        weight = randn(block, 64, 256)
        stored, scale = quantize(weight, chosen, "cpu")
        if block == 4:
            scale = scale * 1.2
        accuracy.add(f"blocks.{block}.ffn.0.weight", weight, stored, scale, chosen.settings(256, tensor_cores=True))
    assert [layer.name for layer in accuracy.suffering()] == ["blocks.4.ffn.0"]


def test_layers_that_differ_a_little_do_not_suffer() -> None:
    assert model().warnings() == []
    assert model(blocks_2_ffn_0=0.05).warnings() == []  # less than twice the median
    assert model(relative=NEGLIGIBLE / 100, blocks_2_ffn_0=NEGLIGIBLE * 0.9).warnings() == []


def test_each_format_has_its_own_median() -> None:
    accuracy = model(relative=0.01)
    for block in range(8):
        accuracy.record(f"blocks.{block}.ffn.2", (256, 256), "fp8_e5m2", err(0.05))
    assert accuracy.suffering() == []


def test_broken_layers_are_warned_of_even_if_all_are() -> None:
    assert len(model(relative=0.7).suffering()) == 16
    accuracy = model(blocks_2_ffn_0=math.nan, blocks_3_ffn_0=math.inf)
    assert {layer.name for layer in accuracy.suffering()} == {"blocks.2.ffn.0", "blocks.3.ffn.0"}
    assert "up to NaN" in accuracy.warnings()[0] or "up to inf" in accuracy.warnings()[0]


def test_a_layer_outside_the_blocks_gets_a_pattern_as_well() -> None:
    accuracy = model()
    accuracy.record("time_embedding.0.weight", (256, 256), "fp8_e4m3fn", err(0.5))
    (layer,) = accuracy.suffering()
    assert re.search(keep_pattern([layer]), "time_embedding.0")
    assert not re.search(keep_pattern([layer]), "time_embedding.02")
    assert keep_pattern([]) == ""


# -- JSON -----------------------------------------------------------------------------------------------------------------


def test_the_json_is_strict_and_complete() -> None:
    accuracy = model(blocks_2_ffn_0=math.nan)
    accuracy.forward = err(0.0)
    told = json.loads(json.dumps(accuracy.as_json(), allow_nan=False))
    assert len(told["layers"]) == 16
    assert told["layers"][0]["error"]["relative"] == 0.026
    assert told["layers"][0]["error"]["snr_db"] == pytest.approx(31.7, abs=0.1)
    assert told["layers"][5]["error"]["relative"] is None
    assert told["suffering"] == ["blocks.2.ffn.0"]
    assert re.search(told["keep"], "blocks.2.ffn.0")
    assert told["forward"]["snr_db"] is None


# -- picture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accuracy",
    [
        Accuracy(),
        model(),
        model(blocks=1),
        model(blocks=60, blocks_3_ffn_0=0.3),
        model(blocks=500),
        model(relative=0.0),
        model(relative=math.nan),
        model(relative=math.inf),
        model(relative=1e-300, blocks_1_ffn_0=1e300),
    ],
)
def test_a_picture_can_be_drawn_of_everything(accuracy: Accuracy) -> None:
    accuracy.forward = err(0.05)
    picture = accuracy.picture("A model")
    assert (picture.mode, picture.width) == ("RGB", WIDTH)
    assert 200 < picture.height < 1200
    assert len(picture.getcolors(1 << 24)) > 50


def test_a_worse_block_is_darker_and_one_that_suffers_is_framed() -> None:
    assert sum(shade(0.0)) > sum(shade(0.3)) > sum(shade(0.7)) > sum(shade(1.0))

    def orange(accuracy: Accuracy) -> int:
        return {colour: count for count, colour in accuracy.picture().getcolors(1 << 24)}[0xD5, 0x5E, 0x00]

    assert orange(model(blocks_3_ffn_0=0.3)) > orange(model()) + 100


def test_of_many_kinds_the_worst_are_shown_and_the_rest_is_counted() -> None:
    accuracy = Accuracy()
    for number in range(70):
        accuracy.record(f"blocks.0.layer{number}", (2, 2), "int8", err(0.01 + 0.001 * (number % 60)))
    (each,) = maps_of(accuracy.layers)
    assert (len(each.rows), each.left_out) == (40, 30)
    assert "layer59" in {row.label for row in each.rows}
    assert accuracy.picture().height < 2000


def test_lists_of_blocks_have_maps_of_their_own() -> None:
    accuracy = Accuracy()
    for name in ("head", "single_blocks.0.a", "double_blocks.0.a", "double_blocks.1.b"):
        accuracy.record(name, (2, 2), "int8", err(0.01))
    maps = maps_of(accuracy.layers)
    assert [each.name for each in maps] == ["single_blocks", "double_blocks", "Outside the blocks"]
    assert [each.columns for each in maps] == [1, 2, 0]
