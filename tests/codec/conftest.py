"""What the tests of lossless coding share: one thread, the same examples on every run, weights of every kind."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
settings.register_profile("codec", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("codec")

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values as a weight of a dtype, scaled as quantization would."""
    if dtype == torch.int8:
        return (values / values.abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30) * 127).nan_to_num(0).round().to(dtype)
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        return (values / values.abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30) * largest).to(dtype)
    return values.to(dtype)


def weights(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Weights as models hold them, and as no model should."""
    torch.manual_seed(3)
    count = math.prod(shape)
    if kind == "noise":
        size = torch.empty(0, dtype=dtype).element_size()
        return torch.randint(0, 256, (count * size,), dtype=torch.uint8, device=device).view(dtype).view(shape)
    if kind == "zeros" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    values = torch.randn(count, device=device) * 0.02
    if kind == "trained":
        values *= torch.exp(0.5 * torch.randn(-(-count // 64), device=device)).repeat_interleave(64)[:count]
    if kind == "nan and inf":
        values[::3], values[1::5], values[2::7] = float("nan"), float("inf"), -float("inf")
    if kind == "denormals":
        values *= torch.finfo(dtype).tiny if dtype.is_floating_point else 0
    return of_dtype(values, dtype).view(shape)


KINDS = ("random", "trained", "nan and inf", "denormals", "zeros", "noise")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [n]"""
    return tensor.contiguous().view(-1).view(torch.uint8)
