"""Which kernels stumble over misaligned operands on a real GPU, and that what moves and what the guard mends is sound.

A misaligned access ends the CUDA context, so each kernel runs in a process of its own: this file, run as a script.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="there is no CUDA device that computes in FP8",
    ),
]

DEVICE = "cuda"
TOKENS, WIDTH = 1024, 5120
OFFSETS = (16, 8, 4, 2, 1)
E4M3 = torch.float8_e4m3fn


def shifted(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, contiguous, ``offset`` bytes after the begin of new memory."""
    memory = torch.empty(tensor.nbytes + offset, dtype=torch.uint8, device=tensor.device)[offset:]
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def fp8_product(first: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=weight.device)
    return torch._scaled_mm(first, weight.t(), one, one, out_dtype=torch.bfloat16)


# what to compute, and the operands of which the last is shifted
KERNELS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "FP8 product, weight": (fp8_product, lambda: (random(TOKENS, WIDTH, dtype=E4M3), random(WIDTH, WIDTH, dtype=E4M3))),
    "FP8 product, first operand": (
        lambda weight, first: fp8_product(first, weight),
        lambda: (random(WIDTH, WIDTH, dtype=E4M3), random(TOKENS, WIDTH, dtype=E4M3)),
    ),
    "linear bf16, weight": (F.linear, lambda: (random(TOKENS, WIDTH), random(WIDTH, WIDTH))),
    "linear bf16, bias": (F.linear, lambda: (random(TOKENS, WIDTH), random(WIDTH, WIDTH), random(WIDTH))),
    "layer norm bf16, weight": (
        lambda x, weight: F.layer_norm(x, (WIDTH,), weight),
        lambda: (random(TOKENS, WIDTH), random(WIDTH)),
    ),
    "attention bf16, query": (
        lambda k, v, q: F.scaled_dot_product_attention(q, k, v),
        lambda: tuple(random(1, 4, TOKENS, 128) for _ in range(3)),
    ),
}


def outcome(compute: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...], offset: int) -> str:
    """right, wrong, refused (an error that leaves the GPU usable), or lost (one that does not), with the message."""
    expected = compute(*operands).float()
    try:
        result = compute(*operands[:-1], shifted(operands[-1], offset)).float()
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return f"lost: {message}"
        return f"refused: {message}"
    error = ((result - expected).norm() / expected.norm()).item()
    return "right" if error < 0.02 else f"wrong by {error:.0%} and no error"


def main(kernel: str) -> None:
    """Print the outcome for each offset, as JSON, until the GPU is lost."""
    compute, make = KERNELS[kernel]
    operands = make()
    outcomes: dict[int, str] = {}
    for offset in OFFSETS:
        if offset % operands[-1].element_size() == 0:
            outcomes[offset] = outcome(compute, operands, offset)
            if outcomes[offset].startswith("lost"):
                break
    print(json.dumps(outcomes), flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[int, str]]:
    """By kernel and offset in bytes; all kernels at once."""
    started = {
        kernel: subprocess.Popen([sys.executable, __file__, kernel], stdout=subprocess.PIPE, text=True)
        for kernel in KERNELS
    }
    printed = {kernel: process.communicate(timeout=120)[0] for kernel, process in started.items()}
    return {kernel: {int(k): v for k, v in json.loads(text).items()} for kernel, text in printed.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bytes_are_enough(outcomes, kernel):
    """Run with -rP to see what each kernel does with less: that is PyTorch's and the driver's affair."""
    print(f"{kernel}: {outcomes[kernel]}")
    assert outcomes[kernel][16] == "right"


def test_what_the_guard_mends_computes_right():
    from intelligent_vram.vram.contiguity import mend

    first, weight = random(TOKENS, WIDTH, dtype=E4M3), random(WIDTH, WIDTH, dtype=E4M3)
    expected = fp8_product(first, weight)
    layer = nn.Module()
    layer.weight = nn.Parameter(shifted(weight, 1), requires_grad=False)
    assert mend(layer) == 1
    assert torch.allclose(fp8_product(first, layer.weight), expected, rtol=0.02)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_move_gives_aligned_memory_and_keeps_the_strides_of_dense_weights_only(pinned):
    memory = torch.randn(64 * 64 + 1)
    memory = memory.pin_memory() if pinned else memory
    weights = {
        "misaligned": memory[1:].view(64, 64),
        "transposed": memory[:4096].view(32, 128).t(),
        "strided": memory[:4096].view(64, 64)[:, ::2],
    }
    for name, weight in weights.items():
        there = weight.to(DEVICE, non_blocking=pinned)
        back = there.to("cpu", non_blocking=True)
        torch.cuda.synchronize()
        assert there.data_ptr() % 512 == 0, name
        assert back.data_ptr() % 16 == 0, name
        assert back.is_pinned(), name
        assert there.is_contiguous() == (name != "transposed"), name
        assert there.stride() == weight.to("meta").stride(), name
        assert torch.equal(back, weight), name


@pytest.mark.parametrize(
    ("rows", "columns", "column_major"), [(32, 64, False), (24, 64, False), (64, 24, False), (32, 64, True)]
)
def test_torch_refuses_the_same_fp8_operands_on_the_gpu_as_on_the_meta_device(rows, columns, column_major):
    """The doctor's rules are tested on the meta device."""

    def refused(device: str) -> bool:
        weight = torch.zeros(rows, columns, device=device).to(E4M3)
        weight = weight.t().contiguous().t() if column_major else weight
        try:
            fp8_product(torch.zeros(32, columns, device=device).to(E4M3), weight)
        except RuntimeError:
            return True
        return False

    assert refused(DEVICE) == refused("meta")


if __name__ == "__main__":
    main(sys.argv[1])
