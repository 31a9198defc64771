"""What the tests of quantization share: one thread, the same examples on every run, small checkpoints of Wan's names."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import save_file

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
settings.register_profile("quant", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("quant")

BLOCKS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wan_like(dtype=torch.bfloat16, blocks=BLOCKS):
    """Weights as Wan names them, of widths that ConvRot rotates (256) and does not (272)."""
    torch.manual_seed(0)
    state = {
        "patch_embedding.weight": torch.randn(32, 16, 1, 2, 2),
        "text_embedding.0.weight": torch.randn(48, 64),
        "head.head.weight": torch.randn(64, 32),
    }
    for block in range(blocks):
        state |= {
            f"blocks.{block}.modulation": torch.randn(1, 6, 32),
            f"blocks.{block}.norm3.weight": torch.randn(32),
            f"blocks.{block}.self_attn.q.weight": torch.randn(32, 256),
            f"blocks.{block}.self_attn.q.bias": torch.randn(32),
            f"blocks.{block}.ffn.0.weight": torch.randn(48, 272),
            f"blocks.{block}.cross_attn.odd.weight": torch.randn(32, 24),
        }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


QUANTIZED = [f"blocks.{block}.{layer}" for block in range(BLOCKS) for layer in ("self_attn.q", "ffn.0")]


@pytest.fixture
def state():
    return wan_like()


@pytest.fixture
def checkpoint(tmp_path, state):
    """A bf16 checkpoint in one file, with metadata."""
    path = tmp_path / "wan.safetensors"
    save_file(state, path, metadata={"author": "someone", "format": "pt"})
    return path


def save_sharded(folder, state, count=3, name="wan"):
    """The same in ``count`` files with an index. Returns the index."""
    folder.mkdir(exist_ok=True)
    names, weight_map = list(state), {}
    for index in range(count):
        file = f"{name}-{index + 1:05}-of-{count:05}.safetensors"
        part = {key: state[key] for key in names[index::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / f"{name}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index_file


def same_bits(one, other):
    """Whether two tensors are of one dtype and shape and equal to the bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def all_same(ours, theirs):
    """Whether two state dicts hold the same names and bits."""
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)
