"""``intelligent-vram quantize``: what it writes and prints, and how it ends."""

import json

import pytest
import torch
from intelligent_vram.cli.main import main
from intelligent_vram.quant.convert import into_memory, plan_conversion
from PIL import Image
from safetensors.torch import load_file, save_file

from .conftest import all_same, wan_like


@pytest.fixture
def quantize(capsys):
    """Runs the command: its exit status, output and errors."""

    def call(*arguments):
        try:
            status = main(["quantize", *map(str, arguments), "--device", "cpu"])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_it_writes_what_the_conversion_makes_and_says_so_in_a_line(quantize, checkpoint, tmp_path):
    status, printed, _ = quantize(checkpoint, tmp_path / "o.safetensors", "--format", "int8_convrot")
    assert status == 0
    assert all_same(
        load_file(tmp_path / "o.safetensors"), into_memory(plan_conversion(checkpoint, "int8_convrot"), "cpu")
    )
    assert len(printed.splitlines()) == 1
    for words in ("o.safetensors: ", "GB/s", "6 weights in int8_convrot", "kept (", "it lies outside the blocks"):
        assert words in printed


def test_options_are_those_of_the_plan(quantize, checkpoint, tmp_path):
    options = ("--keep", "ffn", "--first-last", "1", "--dequantize")
    status, printed, _ = quantize(checkpoint, tmp_path / "o.safetensors", *options)
    assert status == 0
    assert "1 weights in fp8_e4m3fn" in printed
    settings = json.loads(bytes(load_file(tmp_path / "o.safetensors")["blocks.1.self_attn.q.comfy_quant"].tolist()))
    assert settings == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert quantize(checkpoint, tmp_path / "old.safetensors", "--layout", "scaled_fp8")[0] == 0
    assert "scaled_fp8" in load_file(tmp_path / "old.safetensors")


@pytest.mark.parametrize("kind", ["png", "json"])
def test_a_report_is_printed_and_written(quantize, checkpoint, tmp_path, kind):
    status, printed, _ = quantize(checkpoint, tmp_path / "o.safetensors", "--report", tmp_path / f"r.{kind}")
    assert status == 0
    assert len(printed.splitlines()) > 3
    if kind == "png":
        with Image.open(tmp_path / "r.png") as image:
            image.verify()
    else:
        assert json.loads((tmp_path / "r.json").read_text())


def test_nothing_is_replaced_without_being_told(quantize, checkpoint, tmp_path):
    target = tmp_path / "o.safetensors"
    target.write_bytes(b"precious")
    status, _, error = quantize(checkpoint, target)
    assert (status, target.read_bytes()) == (2, b"precious")
    assert "exists already" in error
    assert quantize(checkpoint, target, "--overwrite")[0] == 0


def test_a_checkpoint_that_cannot_be_quantized_ends_with_1(quantize, checkpoint, tmp_path):
    quantize(checkpoint, tmp_path / "q.safetensors")
    status, _, error = quantize(tmp_path / "q.safetensors", tmp_path / "o.safetensors")
    assert status == 1
    assert "already" in error
    state = wan_like()
    state["blocks.0.ffn.0.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    status, _, error = quantize(tmp_path / "nan.safetensors", tmp_path / "o.safetensors")
    assert status == 1
    assert "blocks.0.ffn.0.weight" in error
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "target", "options", "words"),
    [
        ("none.safetensors", "o.safetensors", (), "no such file"),
        ("wan.safetensors", "o.bin", (), "end in .safetensors"),
        ("wan.safetensors", "o.safetensors", ("--keep", "("), "no regular expression"),
        ("wan.safetensors", "o.safetensors", ("--report", "r.txt"), "a report is a"),
        ("wan.safetensors", "o.safetensors", ("--layout", "scaled_fp8", "--format", "int8"), "fp8_e4m3fn only"),
    ],
)
def test_what_cannot_be_read_or_written_ends_with_2(quantize, checkpoint, tmp_path, source, target, options, words):
    status, _, error = quantize(tmp_path / source, tmp_path / target, *options)
    assert status == 2
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / target).exists()
