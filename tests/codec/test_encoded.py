"""A weight that is kept encoded reads as the plain one, whoever reads it."""

import copy

import pytest
import torch
from intelligent_vram.vram.codec import CHUNK, Corrupt, codec_for, kind_of
from intelligent_vram.vram.encoded import EncodedTensor
from torch import nn

from .conftest import DTYPES, bytes_of, weights


def encoded(plain: torch.Tensor, checksum: int | None = None) -> EncodedTensor:
    codec = codec_for(torch.device("cpu"))
    target = torch.zeros(2 * plain.nbytes + 4096, dtype=torch.uint8)
    chunks = codec.encode(bytes_of(plain), kind_of(plain.dtype), target)
    data = target[: chunks.encoded].clone()
    return EncodedTensor(data, plain.dtype, plain.shape, plain.stride(), codec.name, CHUNK, "blocks.0.weight", checksum)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_has_the_shape_the_dtype_and_the_values_of_the_plain_one(dtype):
    plain = weights("trained", (48, 64), dtype)
    tensor = encoded(plain)
    assert (tensor.shape, tensor.dtype, tensor.nbytes, tensor.device) == (
        plain.shape,
        dtype,
        plain.nbytes,
        plain.device,
    )
    assert torch.equal(bytes_of(tensor.decode()), bytes_of(plain))
    assert torch.equal(tensor.float(), plain.float())


def test_a_module_computes_with_it_and_gives_it_out_and_takes_it_back():
    plain = weights("trained", (48, 64), torch.bfloat16)
    layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(encoded(plain), requires_grad=False)
    x = torch.randn(3, 64).bfloat16()
    expected = nn.functional.linear(x, plain)
    assert torch.equal(layer(x), expected)
    state = layer.state_dict()
    assert isinstance(state["weight"], EncodedTensor)
    other = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    other.load_state_dict(state)
    assert torch.equal(other.weight, plain)
    other.load_state_dict(state, assign=True)
    assert isinstance(other.weight, EncodedTensor)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_a_module_that_is_moved_or_cast_holds_plain_weights_that_can_be_changed():
    plain = weights("trained", (48, 64), torch.bfloat16)
    layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(encoded(plain), requires_grad=False)
    layer.float()
    assert torch.equal(layer.weight, plain.float())
    layer.weight.mul_(2)
    assert torch.equal(layer.weight, plain.float() * 2)
    assert torch.equal(copy.deepcopy(layer).weight, plain.float() * 2)


def test_it_cannot_be_changed_in_place_without_anybody_noticing():
    with pytest.raises(RuntimeError, match=r"blocks.0.weight is kept encoded"):
        encoded(weights("trained", (48, 64), torch.bfloat16)).add_(1)


def test_strides_that_a_weight_has_on_purpose_are_kept():
    plain = weights("trained", (48, 64), torch.float8_e4m3fn).t()
    data = encoded(plain.t())
    tensor = EncodedTensor(data.encoded, plain.dtype, plain.shape, plain.stride(), data.codec, CHUNK, "w")
    assert tensor.decode().stride() == plain.stride()
    assert torch.equal(bytes_of(tensor.decode().t()), bytes_of(plain.t()))


def test_bytes_that_are_not_those_of_the_file_are_refused_by_name():
    tensor = encoded(weights("trained", (48, 64), torch.bfloat16), checksum=1)
    with pytest.raises(Corrupt, match=r"blocks.0.weight is damaged.*checksum"):
        tensor.float()
