"""On a GPU: the same bits as on the CPU where kernels allow it, within the memory that was promised."""

import pytest
import torch
from intelligent_vram.quant.convert import into_file, into_memory, plan_conversion
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.quantize import dequantize, quantize
from safetensors.torch import load_file

from .conftest import all_same

MIB = 1 << 20
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_memory_and_file_agree_and_are_close_to_the_cpu(checkpoint, tmp_path, name):
    conversion = plan_conversion(checkpoint, name)
    made = into_memory(conversion, "cuda")
    assert all(tensor.device.type == "cpu" for tensor in made.values())
    path = into_file(conversion, tmp_path / "made.safetensors", "cuda")
    assert all_same(load_file(path), made)
    on_cpu = into_memory(conversion, "cpu")
    for weight, settings in conversion.settings.items():
        scale = f"{weight}_scale"
        ours, theirs = (dequantize(each[weight], each[scale], FORMATS[name], settings) for each in (made, on_cpu))
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_weight_of_a_14b_model_takes_little_beside_itself(name, dtype):
    weight = torch.randn(13824, 5120, device="cuda", dtype=dtype)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stored, scale = quantize(weight, FORMATS[name], "cuda")
    taken = torch.cuda.max_memory_allocated() - before - stored.nbytes - scale.nbytes
    assert taken <= 256 * MIB
