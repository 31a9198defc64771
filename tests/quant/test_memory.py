"""How much memory a conversion takes, measured in a process of its own on a checkpoint of 600 MB."""

import json
import subprocess
import sys

import pytest
import torch

MIB = 1 << 20
ROWS, COLUMNS, BLOCKS = 4096, 2560, 28
WEIGHT = ROWS * COLUMNS * 2  # bytes: 20 MiB

CODE = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from intelligent_vram.quant.convert import into_file, into_memory, plan_conversion
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.quantize import quantize

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

quantize(torch.ones(16, 16), FORMATS["fp8_e4m3fn"], "cpu")  # what imports take is not counted
conversion = plan_conversion(sys.argv[1], "fp8_e4m3fn")
before = peak()
if sys.argv[2]:
    into_file(conversion, sys.argv[2], "cpu")
else:
    made = into_memory(conversion, "cpu")
    assert sum(tensor.nbytes for tensor in made.values()) == conversion.nbytes
print(json.dumps([peak() - before, conversion.nbytes, conversion.source_nbytes]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """28 weights of 20 MiB, each of the same bytes: written in a moment."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    header = {
        f"blocks.{block}.ffn.0.weight": {
            "dtype": "BF16",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [block * WEIGHT, (block + 1) * WEIGHT],
        }
        for block in range(BLOCKS)
    }
    encoded = json.dumps(header).encode()
    data = torch.randn(ROWS, COLUMNS).bfloat16().view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in range(BLOCKS):
            file.write(data)
    yield path
    path.unlink()


def measure(*arguments):
    pytest.importorskip("resource", reason="the peak of a process is read with a module that Windows does not have")
    result = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_into_memory_takes_the_quantized_size_and_a_constant(large):
    taken, made, source = measure(str(large), "")
    assert source == BLOCKS * WEIGHT
    assert taken <= 1.05 * made + 450 * MIB  # pieces read ahead, one weight, float32 slices


def test_into_file_takes_a_constant(large, tmp_path):
    taken, made, _ = measure(str(large), str(tmp_path / "made.safetensors"))
    assert (tmp_path / "made.safetensors").stat().st_size > made
    assert taken <= 450 * MIB
