"""A weight that is kept encoded reads as the plain one, whoever reads it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram.codec import CHUNK, Corrupt, codec_for, kind_of
from intelligent_vram.vram.encoded import EncodedTensor, checksum_of
from safetensors.torch import load, save
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


@pytest.mark.parametrize("wrap", [lambda tensor: tensor, lambda tensor: nn.Parameter(tensor, requires_grad=False)])
def test_it_is_pickled_as_the_plain_tensor_and_not_written_by_safetensors(wrap):
    plain = weights("trained", (48, 64), torch.bfloat16)
    tensor = wrap(encoded(plain))
    torch.save({"weight": tensor}, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    for other in (loaded, pickle.loads(pickle.dumps(tensor)), copy.copy(tensor)):
        assert not isinstance(other, EncodedTensor)
        assert type(other) is type(wrap(plain))
        assert torch.equal(other, plain)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.weight is kept encoded.*--decompress"):
        save({"weight": tensor})
    layer = nn.Module()
    layer.weight = nn.Parameter(encoded(plain), requires_grad=False)
    assert torch.equal(load(save(layer.to(torch.bfloat16).float().state_dict()))["weight"], plain.float())


def test_bytes_that_are_not_those_of_the_file_are_refused_by_name():
    tensor = encoded(weights("trained", (48, 64), torch.bfloat16), checksum=1)
    with pytest.raises(Corrupt, match=r"blocks.0.weight is damaged.*checksum"):
        tensor.float()


@given(st.integers(0, 9000), st.integers(1, 255), st.data())
def test_a_byte_that_changed_and_parts_that_changed_places_are_found(length, change, data):
    torch.manual_seed(length)
    whole = torch.randint(0, 256, (length,), dtype=torch.uint8)
    checksum = checksum_of(whole)
    if length:
        damaged = whole.clone()
        damaged[data.draw(st.integers(0, length - 1))] ^= change
        assert checksum_of(damaged) != checksum
    assert checksum_of(whole[:-1]) != checksum or not length
    if length >= 2048:
        assert checksum_of(torch.cat((whole[1024:2048], whole[:1024], whole[2048:]))) != checksum
    lying = torch.cat((whole[:0], torch.zeros(3, dtype=torch.uint8), whole))[3:]  # not where words lie
    assert checksum_of(lying) == checksum


# Torch looks for DTensor, and so imports torch.distributed.tensor and sympy, when it first dispatches on a subclass.
STREAMED = """
import sys
import tempfile
from pathlib import Path

import torch
from intelligent_vram.quant.lossless import compress_file
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.encoded import is_encoded
from intelligent_vram.vram.encoded_file import load_encoded
from safetensors.torch import save_file
from torch import nn

def model():
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(256, 256) for _ in range(4))})

device, config = torch.device("cpu"), SwapConfig(mode="chunkwise", streamed_blocks=4, lossless="on")
with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
    plain, packed = Path(folder, "plain.safetensors"), Path(folder, "packed.safetensors")
    made = model()
    save_file(made.state_dict(), plain)
    compress_file(plain, packed, device)
    loaded = model()
    loaded.load_state_dict(load_encoded(packed)[0], assign=True)
    x = torch.randn(2, 256)
    for some in (made, loaded):
        some.forward = lambda x, some=some: [x := block(x) for block in some["blocks"]][-1]
        swap = attach(some, config, device)
        assert all(is_encoded(block.weight) for block in some["blocks"])
        result = some.forward(x)
        swap.detach()
    print(torch.equal(result, made.forward(x)), *(name for name in sys.modules if name in ("sympy", "torch.distributed.tensor")))
"""


def test_streaming_encoded_weights_does_not_make_torch_import_what_nobody_asked_for():
    ran = subprocess.run([sys.executable, "-c", STREAMED], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["True"]
