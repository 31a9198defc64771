"""The guard for weights that others move. The CPU stands in for the GPU: the guard is told to look there."""

import pytest
import torch
from intelligent_vram.vram.contiguity import ALIGNMENT, Guard, find, mend, problem_of, strides_are_deliberate
from torch import nn


def block_with(weight: torch.Tensor) -> nn.Module:
    block = nn.Sequential(nn.Linear(8, 8))
    block[0]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    block.register_buffer("scale", torch.ones(4))
    return block


def misaligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count + 1).to(dtype)[1:].view(shape)


@pytest.mark.parametrize(
    "weight",
    [misaligned(8, 8), torch.randn(8, 8).t(), torch.randn(8, 16)[:, ::2], misaligned(8, 8, dtype=torch.bfloat16)],
    ids=["misaligned", "transposed", "strided", "misaligned bf16"],
)
def test_what_arrives_wrong_is_mended_with_the_same_values_in_the_same_parameter(weight):
    block = block_with(weight)
    parameter, wanted = block[0].weight, weight.clone()
    guard = Guard(("cpu",))
    guard.add(block)
    assert find(block)
    block.to("cpu")
    assert guard.mended == 1
    assert not find(block)
    assert block[0].weight is parameter
    assert torch.equal(parameter, wanted)
    assert parameter.is_contiguous()
    assert parameter.data_ptr() % 16 == 0


def test_what_is_right_is_left_alone():
    block = block_with(torch.randn(8, 8))
    addresses = [tensor.data_ptr() for tensor in block.state_dict().values()]
    guard = Guard(("cpu",))
    guard.add(block)
    block.to("cpu")
    assert guard.mended == 0
    assert addresses == [tensor.data_ptr() for tensor in block.state_dict().values()]


def test_an_fp8_operand_keeps_its_column_major_strides():
    weight = torch.randn(16, 32).to(torch.float8_e4m3fn).t()
    assert strides_are_deliberate(weight)
    assert problem_of(weight) is None
    odd = torch.zeros(16 * 32 + 1, dtype=torch.float8_e4m3fn)[1:].view(16, 32).t()
    block = block_with(odd)
    assert mend(block, ("cpu",)) == 1
    assert block[0].weight.stride() == odd.stride()
    assert block[0].weight.data_ptr() % 16 == 0


def test_other_devices_are_not_looked_at():
    block = block_with(misaligned(8, 8))
    assert mend(block, ("cuda",)) == 0
    assert find(block)


def test_moving_a_module_around_the_block_is_seen_too():
    block = block_with(misaligned(8, 8))
    model = nn.ModuleList([block])
    guard = Guard(("cpu",))
    guard.add(block)
    model.to("cpu")
    assert guard.mended == 1


def test_the_guard_comes_off_without_a_trace():
    block = block_with(misaligned(8, 8))
    before = dict(block.__dict__)
    guard = Guard(("cpu",))
    guard.add(block)
    guard.remove()
    assert block.__dict__ == before
    block.to("cpu")
    assert guard.mended == 0


def test_a_finding_names_the_weight_and_says_what_is_wrong():
    (finding,) = find(block_with(torch.randn(8, 8).t()))
    assert finding.path == "0.weight"
    assert "strides (1, 8)" in finding.problem


def test_channels_last_and_sparse_weights_are_left_as_they_are():
    convolution = nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d)
    sparse = nn.Module()
    sparse.register_buffer("matrix", torch.eye(8).to_sparse())
    model = nn.Sequential(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), convolution, sparse)
    strides = [weight.stride() for weight in model.parameters()]
    assert find(model) == []
    assert mend(model, ("cpu",)) == 0
    assert [weight.stride() for weight in model.parameters()] == strides
    misaligned = torch.empty(convolution.weight.numel() + 1)[1:].as_strided(
        convolution.weight.shape, convolution.weight.stride()
    )
    convolution.weight.data = misaligned.copy_(convolution.weight.data)
    before = convolution.weight.detach().clone()
    assert mend(model, ("cpu",)) == 1
    assert convolution.weight.stride() == before.stride()
    assert convolution.weight.data_ptr() % ALIGNMENT == 0
    assert torch.equal(convolution.weight, before)
