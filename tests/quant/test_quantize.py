"""One weight: the bits are comfy-kitchen's, whatever the slices, and the round trip loses what the format has to lose."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.quant import quantize as module
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.quantize import Unquantizable, dequantize, quantize

from .conftest import same_bits

# the largest relative error of one element, of the largest element of its scale
STEPS = {"fp8_e4m3fn": 1 / 16, "fp8_e5m2": 1 / 8, "int8": 1 / 250, "int8_convrot": math.inf}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_of(rows=32, columns=256, dtype=torch.bfloat16, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


def round_trip(weight, format):
    stored, scale = quantize(weight, format, "cpu")
    return dequantize(stored, scale, format, format.settings(weight.shape[1], True))


@pytest.fixture
def without_kitchen(monkeypatch):
    monkeypatch.setattr(module, "_kitchen", lambda device_type: None)


def kitchens_own(weight, name):
    """What comfy-kitchen makes of a weight by the calls that ComfyUI makes: stored elements, and scale."""
    kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: nothing to compare with")
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    weight = weight.float()
    if name.startswith("fp8"):
        dtype = FORMATS[name].storage
        scale = quantize(weight, FORMATS[name], "cpu")[1]
        return kitchen.quantize_per_tensor_fp8(weight, scale, dtype), scale
    stored, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=name == "int8_convrot")
    return stored, params.scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_gets_the_bits_that_comfy_kitchen_gives_it(name, dtype):
    weight = weight_of(dtype=dtype)
    wanted, wanted_scale = kitchens_own(weight, name)
    stored, scale = quantize(weight, FORMATS[name], "cpu")
    assert same_bits(stored, wanted)
    assert same_bits(scale, wanted_scale)
    assert stored.dtype is FORMATS[name].storage
    assert tuple(scale.shape) == FORMATS[name].scale_shape(len(weight))


@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", FORMATS)
def test_the_formulas_without_comfy_kitchen_give_the_same_bits(name, spread, without_kitchen):
    weight = weight_of(dtype=torch.float32, spread=spread)
    wanted, wanted_scale = kitchens_own(weight, name)
    stored, scale = quantize(weight, FORMATS[name], "cpu")
    assert same_bits(stored, wanted)
    assert same_bits(scale, wanted_scale)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_restored_is_what_comfy_kitchen_restores(name):
    kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: nothing to compare with")
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    format, weight = FORMATS[name], weight_of()
    stored, scale = quantize(weight, format, "cpu")
    if name.startswith("fp8"):
        wanted = kitchen.dequantize_per_tensor_fp8(stored, scale, torch.float32)
    else:
        _, params = TensorWiseINT8Layout.quantize(weight.float(), per_channel=True, convrot=name == "int8_convrot")
        wanted = TensorWiseINT8Layout.dequantize(stored, dataclasses.replace(params, orig_dtype=torch.float32))
    assert torch.equal(dequantize(stored, scale, format, format.settings(256, True)), wanted)


@pytest.mark.parametrize("kitchen", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_slices_of_rows_give_what_the_whole_gives(name, kitchen, monkeypatch):
    if not kitchen:
        monkeypatch.setattr(module, "_kitchen", lambda device_type: None)
    weight = weight_of(rows=48)
    whole, whole_scale = quantize(weight, FORMATS[name], "cpu")
    monkeypatch.setattr(module, "SLICE", 5 * 256)  # 5 rows: the last slice is a part
    stored, scale = quantize(weight, FORMATS[name], "cpu")
    if name == "int8_convrot":  # matrix products of other sizes may differ in the last bit
        assert torch.allclose(scale, whole_scale, rtol=1e-6)
        assert (stored.int() - whole.int()).abs().max() <= 1
    else:
        assert same_bits(stored, whole)
        assert same_bits(scale, whole_scale)


@given(
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 6).map(lambda count: 16 * count),
    columns=st.sampled_from([16, 48, 256, 272, 512]),
    exponent=st.integers(-4, 4),
    seed=st.integers(0, 1000),
)
def test_no_element_moves_further_than_its_format_rounds(name, dtype, rows, columns, exponent, seed):
    weight = weight_of(rows, columns, dtype, 10.0**exponent, seed)
    restored, original = round_trip(weight, FORMATS[name]), weight.float()
    difference = (restored - original).abs()
    relative = float(difference.norm() / original.norm())
    assert relative < {"fp8_e4m3fn": 0.03, "fp8_e5m2": 0.06}.get(name, 0.013)
    if FORMATS[name].per_row:
        largest = original.abs().amax(dim=1, keepdim=True)
        assert bool((difference <= largest * STEPS[name]).all())
    else:
        smallest = original.abs().max() * 2.0**-14  # below it elements are subnormal
        assert bool((difference <= original.abs() * STEPS[name] + smallest).all())


@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=256, max_size=256),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_any_finite_values_stay_finite_and_of_their_sign(values, name):
    weight = torch.tensor(values).reshape(16, 16)  # too narrow for ConvRot, which mixes columns
    restored = round_trip(weight, FORMATS[name])
    assert bool(restored.isfinite().all())
    assert bool((restored.sign() * weight.sign() >= 0).all())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    stored, scale = quantize(torch.zeros(16, 256), FORMATS[name], "cpu")
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert not dequantize(stored, scale, FORMATS[name], FORMATS[name].settings(256, True)).any()


@pytest.mark.parametrize("kitchen", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_are_refused(name, dtype, value, kitchen, monkeypatch):
    if not kitchen:
        monkeypatch.setattr(module, "_kitchen", lambda device_type: None)
    weight = weight_of(dtype=dtype)
    weight[17, 3] = value
    with pytest.raises(Unquantizable, match="NaN or infinite"):
        quantize(weight, FORMATS[name], "cpu")


def test_values_whose_rotation_overflows_are_refused():
    with pytest.raises(Unquantizable):
        quantize(torch.full((16, 256), 3e38), FORMATS["int8_convrot"], "cpu")


def test_the_scale_of_e4m3_is_the_next_that_bf16_holds():
    for seed in range(50):
        weight = weight_of(16, 16, torch.float32, seed=seed)
        _, scale = quantize(weight, FORMATS["fp8_e4m3fn"], "cpu")
        exact = weight.abs().max() / 448
        assert scale == scale.bfloat16().float()
        assert exact <= scale <= exact * (1 + 2**-7)
    _, scale = quantize(torch.full((16, 16), 448.0), FORMATS["fp8_e4m3fn"], "cpu")
    assert scale == 1.0


def test_a_vector_is_no_weight():
    with pytest.raises(ValueError, match="no matrix"):
        quantize(torch.zeros(16), FORMATS["int8"], "cpu")


def test_elements_of_another_format_are_not_restored():
    with pytest.raises(ValueError, match="stores"):
        dequantize(torch.zeros(16, 16, dtype=torch.int8), torch.ones(()), FORMATS["fp8_e4m3fn"], {})


def test_comfy_kitchen_is_not_imported_before_it_is_needed():
    import subprocess
    import sys

    code = "import sys, intelligent_vram.quant.convert; sys.exit('comfy_kitchen' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- formats -------------------------------------------------------------------------------------------------------------


def test_settings_are_what_comfyui_reads():
    assert FORMATS["fp8_e4m3fn"].settings(256, True) == {"format": "float8_e4m3fn"}
    full = {"full_precision_matrix_mult": True}
    assert FORMATS["fp8_e4m3fn"].settings(256, False) == {"format": "float8_e4m3fn", **full}
    assert FORMATS["fp8_e5m2"].settings(256, True) == {"format": "float8_e5m2", **full}
    assert FORMATS["int8"].settings(256, True) == {"format": "int8_tensorwise"}
    rotated = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    assert FORMATS["int8_convrot"].settings(512, True) == rotated
    assert FORMATS["int8_convrot"].settings(272, True) == {"format": "int8_tensorwise"}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((16,), "1 dimension,"),
        ((2, 16, 16), "3 dimensions"),
        ((16, 24), "multiples of 16"),
        ((0, 16), "multiples of 16"),
    ],
)
def test_a_shape_that_does_not_suit_is_refused_in_words(shape, words):
    assert words in FORMATS["int8"].refuses(shape)
    assert FORMATS["int8"].refuses((16, 32)) is None
