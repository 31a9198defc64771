"""A weight that went through a packed buffer is the weight that went in: bits, strides on purpose, class, attributes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram.arena import copy_host
from intelligent_vram.vram.layout import (
    ALIGNMENT,
    CannotPack,
    Entry,
    align,
    flatten,
    is_dense,
    plan_tensor,
    strides_to_keep,
)
from torch import nn

from .subclasses import Opaque, QuantParameter, QuantTensor, Scaled

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


def random_bits(shape, dtype, seed=0):
    """A row-major tensor of any bit pattern, NaN included; for bool of valid ones."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor):
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8)


def same_bits(one, other):
    return one.shape == other.shape and one.dtype == other.dtype and bits(one).equal(bits(other))


@st.composite
def tensors(draw):
    """Any strided tensor: every dtype, up to four dimensions, zero-size, scalar, permuted, sliced, expanded, shifted."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    kind = draw(st.sampled_from(("row-major", "permuted", "sliced", "expanded", "shifted")))
    seed = draw(st.integers(0, 1000))
    if kind == "permuted":
        return random_bits(shape, dtype, seed).permute(draw(st.permutations(range(len(shape)))))
    if kind == "sliced" and shape:
        wide = random_bits([*shape[:-1], 2 * shape[-1] + 1], dtype, seed)
        return wide[..., 1::2]
    if kind == "expanded":
        return random_bits([1, *shape], dtype, seed).expand(draw(st.integers(1, 4)), *shape)
    if kind == "shifted":
        return random_bits([torch.Size(shape).numel() + 3], dtype, seed)[3:].reshape(shape)
    return random_bits(shape, dtype, seed)


def pack(values, copy=copy_host):
    """``values`` packed one behind the other: (buffer, a list of specs for each)."""
    specs, size = [], 0
    for value in values:
        own = []
        for part in flatten(value)[0]:
            own.append(plan_tensor(part, size))
            size = align(own[-1].offset + own[-1].nbytes)
        specs.append(own)
    buffer = torch.full((size,), 0xAB, dtype=torch.uint8)
    for value, own in zip(values, specs, strict=True):
        for part, spec in zip(flatten(value)[0], own, strict=True):
            copy(spec, part, buffer)
    return buffer, specs


def through_a_buffer(value, copy=copy_host):
    buffer, (specs,) = pack([value], copy)
    return flatten(value)[1]([spec.view(buffer) for spec in specs])


@given(st.lists(tensors(), max_size=6), st.just(copy_host))
def test_any_tensors_come_back_bit_for_bit(values, copy):
    buffer, specs = pack(values, copy)
    for value, own in zip(values, specs, strict=True):
        rebuilt = flatten(value)[1]([spec.view(buffer) for spec in own])
        assert type(rebuilt) is torch.Tensor
        assert same_bits(rebuilt, value)


@given(st.lists(tensors(), min_size=1, max_size=6))
def test_every_tensor_starts_at_512_bytes_and_none_overlap(values):
    buffer, specs = pack(values)
    flat = [spec for own in specs for spec in own]
    assert all(spec.offset % ALIGNMENT == 0 for spec in flat)
    assert all(before.offset + before.nbytes <= after.offset for before, after in pairwise(flat))
    assert flat[-1].offset + flat[-1].nbytes <= buffer.numel()
    assert buffer.numel() <= sum(value.numel() * value.element_size() + ALIGNMENT - 1 for value in values)


@given(tensors())
def test_a_packed_tensor_is_dense_and_keeps_strides_that_were_dense(value):
    rebuilt = through_a_buffer(value)
    if rebuilt.numel():
        assert is_dense(rebuilt)
        assert rebuilt.stride() == value.stride() if is_dense(value) else rebuilt.is_contiguous()


@given(tensors())
def test_dense_means_that_the_elements_fill_their_span_exactly(value):
    offsets = torch.zeros(value.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        offsets += (torch.arange(size) * stride).reshape([-1 if dim == at else 1 for at in range(value.dim())])
    if value.numel():
        assert is_dense(value) == (sorted(offsets.reshape(-1).tolist()) == list(range(value.numel())))


def test_a_column_major_fp8_operand_stays_column_major():
    weight = random_bits((16, 32), torch.float8_e4m3fn).t()
    assert through_a_buffer(weight).stride() == (1, 32)


def test_a_channels_last_weight_stays_channels_last():
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert through_a_buffer(weight).is_contiguous(memory_format=torch.channels_last)


def test_a_slice_of_something_larger_becomes_contiguous():
    weight = torch.randn(8, 8)[:, 2:5]
    assert strides_to_keep(weight) == (3, 1)
    assert through_a_buffer(weight).is_contiguous()


@pytest.mark.parametrize("copy", [copy_host])
def test_a_lazily_conjugated_tensor_comes_back_as_what_it_reads_as(copy):
    weight = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert through_a_buffer(weight, copy).equal(weight.resolve_conj())


@pytest.mark.parametrize("copy", [copy_host])
def test_a_lazily_negated_tensor_comes_back_as_what_it_reads_as(copy):
    weight = torch._neg_view(torch.tensor([1.0, -2.0]))
    assert through_a_buffer(weight, copy).equal(weight.resolve_neg())


def test_taking_apart_copies_nothing():
    weight = nn.Parameter(torch.randn(3, 4))
    (part,), _ = flatten(weight)
    assert part.data_ptr() == weight.data_ptr()


def test_a_view_of_a_packed_tensor_shares_the_buffer_wherever_that_begins():
    buffer, specs = pack([torch.ones(4), torch.ones(4)])
    second = specs[1][0]
    second.view(buffer).fill_(7)
    assert second.shifted(ALIGNMENT).view(buffer[ALIGNMENT:]).tolist() == [7.0] * 4
    assert specs[0][0].view(buffer).tolist() == [1.0] * 4


def test_a_parameter_stays_a_parameter_with_what_was_hung_onto_it():
    weight = nn.Parameter(torch.randn(3, 4))
    weight.comfy_cast_weights, weight.note = True, {"rank": 4}
    rebuilt = through_a_buffer(weight)
    assert type(rebuilt) is nn.Parameter
    assert rebuilt.comfy_cast_weights is True
    assert rebuilt.note is weight.note
    assert rebuilt.equal(weight)


def test_a_buffer_does_not_become_a_parameter():
    buffer = torch.randn(3)
    buffer.note = "kept"
    rebuilt = through_a_buffer(buffer)
    assert not isinstance(rebuilt, nn.Parameter)
    assert rebuilt.note == "kept"


def test_an_entry_binds_to_a_part_of_a_buffer():
    module = nn.Linear(4, 4)
    buffer, specs = pack([torch.zeros(600), module.weight])
    entry = Entry("weight", module._parameters, "weight", module.weight, (specs[1][0],), flatten(module.weight)[1])
    shift = specs[1][0].offset
    assert entry.bind(buffer).equal(module.weight)
    assert entry.bind(buffer[shift:], shift).equal(module.weight)


def test_a_thin_parameter_subclass_keeps_its_class_and_attributes():
    weight = QuantParameter(random_bits((4, 18), torch.uint8), quant_type="Q4_0")
    rebuilt = through_a_buffer(weight)
    assert type(rebuilt) is QuantParameter
    assert rebuilt.quant_type == "Q4_0"
    assert same_bits(rebuilt.as_subclass(torch.Tensor), weight.as_subclass(torch.Tensor))


@pytest.mark.parametrize("as_parameter", [False, True])
def test_a_thin_tensor_subclass_that_lies_about_its_shape_is_packed_by_its_bytes(as_parameter):
    weight = QuantTensor(random_bits((4, 18), torch.uint8), tensor_shape=(4, 32))
    weight = nn.Parameter(weight, requires_grad=False) if as_parameter else weight
    rebuilt = through_a_buffer(weight)
    assert type(rebuilt) is QuantTensor
    assert isinstance(rebuilt, nn.Parameter) is as_parameter
    assert rebuilt.shape == (4, 32)
    assert same_bits(rebuilt.as_subclass(torch.Tensor), weight.as_subclass(torch.Tensor))


@pytest.mark.parametrize("as_parameter", [False, True])
def test_a_wrapper_subclass_is_packed_by_its_inner_tensors(as_parameter):
    weight = Scaled(random_bits((4, 8), torch.int8), torch.tensor(0.25), torch.float32)
    weight = nn.Parameter(weight, requires_grad=False) if as_parameter else weight
    weight.note = "kept"
    buffer, (specs,) = pack([weight])
    rebuilt = flatten(weight)[1]([spec.view(buffer) for spec in specs])
    assert type(rebuilt) is Scaled
    assert isinstance(rebuilt, nn.Parameter) is as_parameter
    assert rebuilt.note == "kept"
    assert rebuilt.dequantized().equal(weight.dequantized())
    assert rebuilt._data.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert rebuilt._scale.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_a_wrapper_inside_a_wrapper_is_packed_to_the_bottom():
    class Double(Scaled):
        @staticmethod
        def __tensor_unflatten__(inner, dtype, size, stride):
            return Double(inner["_data"], inner["_scale"], dtype)

    inner = Scaled(random_bits((4, 8), torch.int8), torch.tensor(2.0), torch.float32)
    weight = Double(inner, torch.tensor(0.5), torch.float32)
    rebuilt = through_a_buffer(weight)
    assert type(rebuilt) is Double
    assert type(rebuilt._data) is Scaled
    assert rebuilt._data._data.equal(inner._data)
    assert rebuilt._data._scale.item() == 2.0
    assert rebuilt._scale.item() == 0.5


@pytest.mark.parametrize("layout", ["TensorCoreFP8Layout", "TensorWiseINT8Layout"])
def test_a_quantized_tensor_of_comfy_kitchen_survives(layout):
    kitchen = pytest.importorskip(
        "comfy_kitchen.tensor", reason="comfy_kitchen, ComfyUI's quantization, is not installed"
    )
    if not hasattr(kitchen, layout):
        pytest.skip(f"this comfy_kitchen has no {layout}")
    quantized = kitchen.QuantizedTensor.from_float(torch.randn(32, 64, dtype=torch.bfloat16), layout)
    weight = nn.Parameter(quantized, requires_grad=False)
    buffer, (specs,) = pack([weight])
    rebuilt = flatten(weight)[1]([spec.view(buffer) for spec in specs])
    assert type(rebuilt) is kitchen.QuantizedTensor
    assert isinstance(rebuilt, nn.Parameter)
    assert rebuilt.dequantize().equal(weight.dequantize())
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert nn.functional.linear(x, rebuilt).equal(nn.functional.linear(x, weight))
    assert rebuilt._qdata.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "sparse"),
        (Opaque(torch.zeros(3)), "Opaque has no __tensor_flatten__"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_a_reason(tensor, reason):
    with pytest.raises(CannotPack, match=reason):
        flatten(tensor)


def test_a_wrapper_around_something_that_cannot_be_packed_is_refused_too():
    weight = Scaled(torch.empty(4, 8, dtype=torch.int8, device="meta"), torch.tensor(1.0), torch.float32)
    with pytest.raises(CannotPack, match="meta device"):
        flatten(weight)
