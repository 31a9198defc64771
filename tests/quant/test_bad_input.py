"""What cannot be converted: a clear error, and nothing left behind."""

import json
import os
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from intelligent_vram.quant.convert import convert, into_file, into_memory, plan_conversion
from intelligent_vram.quant.quantize import Unquantizable
from intelligent_vram.quant.source import AlreadyQuantized, Refused
from intelligent_vram.quant.write import CannotWrite
from intelligent_vram.vram.model_headers import ModelUnreadable
from safetensors.torch import load_file, save_file

from .conftest import save_sharded, wan_like

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "made.safetensors"


def saved(folder, state, name="bad.safetensors", **metadata):
    save_file(state, folder / name, metadata=metadata or None)
    return folder / name


# -- sources -------------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelUnreadable, match="no such file"):
        plan_conversion(tmp_path / "none.safetensors", "int8")


def test_a_missing_shard(tmp_path, state):
    index = save_sharded(tmp_path / "shards", state)
    next(index.parent.glob("*-00002-*")).unlink()
    with pytest.raises(ModelUnreadable, match="missing beside it"):
        plan_conversion(index, "int8")


@pytest.mark.parametrize("part", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_file(checkpoint, part):
    size = checkpoint.stat().st_size
    os.truncate(checkpoint, int(size * part) if isinstance(part, float) else part)
    with pytest.raises(ModelUnreadable, match=r"wan\.safetensors"):
        plan_conversion(checkpoint, "int8")


def test_a_file_that_shrinks_after_it_was_planned_for(checkpoint, target):
    conversion = plan_conversion(checkpoint, "int8")
    os.truncate(checkpoint, checkpoint.stat().st_size - 100)
    with pytest.raises(ModelUnreadable, match="in the middle of its weights"):
        into_file(conversion, target, "cpu")
    assert not any(target.parent.iterdir())
    checkpoint.unlink()
    with pytest.raises(ModelUnreadable, match="could not be read"):
        into_memory(conversion, "cpu")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"<html>not found</html>" * 9, b"version https://git-lfs" * 9])
def test_a_corrupted_file(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ModelUnreadable):
        plan_conversion(tmp_path / "bad.safetensors", "int8")


def test_a_header_that_lies_about_sizes(checkpoint):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data.replace(b'"shape":[32,256]', b'"shape":[32,999]', 1))
    with pytest.raises(ModelUnreadable, match="do not fit"):
        plan_conversion(checkpoint, "int8")


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors"])
def test_a_pickled_file_whatever_its_name(tmp_path, state, name):
    torch.save(state, tmp_path / name)
    with pytest.raises(Refused, match="pickled"):
        plan_conversion(tmp_path / name, "int8")


def test_a_pickle_of_old(tmp_path, state):
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match="pickled"):
        plan_conversion(tmp_path / "old.safetensors", "int8")


@pytest.mark.parametrize("first", [b"\x80", b"\x80\x04", b"PK"])
def test_a_header_whose_length_looks_like_a_pickle_is_none(checkpoint, first):
    data = checkpoint.read_bytes()
    have = int.from_bytes(data[:8], "little")
    spaces = (int.from_bytes(first, "little") - have) % 256 ** len(first)
    header = data[8 : 8 + have] + b" " * spaces
    checkpoint.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + have :])
    assert checkpoint.read_bytes().startswith(first)
    assert plan_conversion(checkpoint, "int8").quantized


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_gguf_file_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(Refused, match="ComfyUI-GGUF"):
        plan_conversion(tmp_path / name, "none")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"blocks.0.ffn.0.weight.absmax": torch.ones(4)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4": torch.ones(4)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.qweight": torch.ones(4)}, "nunchaku"),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(())}, "in which format"),
        ({"blocks.0.ffn.4.weight": torch.ones(16, 16, dtype=torch.int8)}, "stored as int8"),
        ({"blocks.0.ffn.4.weight": torch.ones(16, 16, dtype=torch.int32)}, "stored as int32"),
        ({"blocks.0.ffn.4.weight": torch.ones(16, 16, dtype=torch.complex64)}, "stored as complex64"),
    ],
)
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_formats_that_comfyui_would_load_as_noise_are_refused_with_the_reason(
    tmp_path, state, extra, words, quantization
):
    with pytest.raises(Refused, match=words) as caught:
        plan_conversion(saved(tmp_path, state | extra), quantization)
    assert not isinstance(caught.value, AlreadyQuantized)


def test_scaled_fp8_in_e5m2_is_refused(tmp_path, state):
    weight = state["blocks.0.ffn.0.weight"].to(torch.float8_e5m2)
    extra = {"blocks.0.ffn.0.weight": weight, "blocks.0.ffn.0.scale_weight": torch.ones(())}
    mark = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e5m2)}
    with pytest.raises(Refused, match="e5m2"):
        plan_conversion(saved(tmp_path, state | extra | mark), "none")


def test_integer_buffers_that_are_no_weights_pass(tmp_path, state):
    path = saved(tmp_path, state | {"blocks.0.positions": torch.arange(4)})
    assert into_memory(plan_conversion(path, "int8"), "cpu")["blocks.0.positions"].tolist() == [0, 1, 2, 3]


def test_metadata_that_is_not_comfyuis(tmp_path, state):
    for text in ("[]", "{", json.dumps({"layers": []})):
        with pytest.raises(ModelUnreadable, match="_quantization_metadata"):
            plan_conversion(saved(tmp_path, state, _quantization_metadata=text), "none")


def test_a_model_of_which_nothing_would_be_quantized(tmp_path, checkpoint):
    with pytest.raises(Refused, match="no list of blocks"):
        plan_conversion(saved(tmp_path, {"a.weight": torch.zeros(16, 16)}), "int8")
    with pytest.raises(Refused, match="every layer is kept"):
        plan_conversion(checkpoint, "int8", keep="blocks")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "int4"}, "no format; there are fp8_e4m3fn"),
        ({"keep": "("}, "no regular expression"),
        ({"first_last": -1}, "less than none"),
        ({"layout": "new"}, "no layout"),
        ({"layout": "scaled_fp8"}, "fp8_e4m3fn only"),
    ],
)
def test_settings_that_make_no_sense(checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        plan_conversion(checkpoint, **{"quantization": "int8", **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", ["fp8_e4m3fn", "fp8_e5m2", "int8", "int8_convrot"])
def test_nan_and_infinity_name_the_layer_and_leave_nothing(tmp_path, target, value, quantization):
    state = wan_like()
    state["blocks.2.ffn.0.weight"][3, 7] = value
    conversion = plan_conversion(saved(tmp_path, state), quantization)
    with pytest.raises(Unquantizable, match=r"blocks\.2\.ffn\.0\.weight .* NaN or infinite"):
        into_file(conversion, target, "cpu")
    assert not any(target.parent.iterdir())
    keep = plan_conversion(tmp_path / "bad.safetensors", quantization, keep=r"blocks\.2\.ffn")
    assert into_file(keep, target, "cpu").is_file()


def test_zeros_are_fine(tmp_path):
    state = {name: torch.zeros_like(tensor) for name, tensor in wan_like().items()}
    made = into_memory(plan_conversion(saved(tmp_path, state), "fp8_e4m3fn"), "cpu")
    assert not made["blocks.0.ffn.0.weight"].float().any()
    assert made["blocks.0.ffn.0.weight_scale"] > 0


# -- targets -------------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_not_replaced_without_being_told(checkpoint, target):
    target.write_bytes(b"precious")
    conversion = plan_conversion(checkpoint, "int8")
    with pytest.raises(FileExistsError, match="exists already"):
        into_file(conversion, target, "cpu")
    assert target.read_bytes() == b"precious"
    into_file(conversion, target, "cpu", overwrite=True)
    assert "blocks.0.ffn.0.comfy_quant" in load_file(target)


def test_a_file_that_appears_in_the_meantime_is_not_replaced_either(checkpoint, target):
    def progress(done, total):
        target.write_bytes(b"precious")

    with pytest.raises(FileExistsError):
        into_file(plan_conversion(checkpoint, "int8"), target, "cpu", progress=progress)
    assert target.read_bytes() == b"precious"
    assert [*target.parent.iterdir()] == [target]


def test_the_source_is_never_replaced(checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(CannotWrite, match="the file that is read"):
        into_file(plan_conversion(checkpoint, "int8"), checkpoint, "cpu", overwrite=True)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("made.bin", "end in .safetensors"),
        ("nowhere/made.safetensors", "no folder"),
        ("d.safetensors", "it is a folder"),
    ],
)
def test_a_place_where_nothing_can_be_written(checkpoint, tmp_path, name, words):
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CannotWrite, match=words):
        into_file(plan_conversion(checkpoint, "int8"), tmp_path / name, "cpu", overwrite=True)


def test_no_space_on_the_disk_is_said_before_anything_is_written(checkpoint, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(CannotWrite, match=r"1000 B free; make .* of room"):
        into_file(plan_conversion(checkpoint, "int8"), target, "cpu")
    assert not any(target.parent.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(checkpoint, target, monkeypatch):
    def full(path, start, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("intelligent_vram.quant.write._write", full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        into_file(plan_conversion(checkpoint, "int8"), target, "cpu")
    assert not any(target.parent.iterdir())


class Stop(Exception):
    """What a host raises to interrupt."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_interrupting_leaves_nothing(checkpoint, target, error, after):
    def progress(done, total):
        if done >= after * total:
            raise error

    with pytest.raises(error):
        into_file(plan_conversion(checkpoint, "int8"), target, "cpu", progress=progress)
    assert not any(target.parent.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("intelligent-vram")]


def test_a_generator_that_is_dropped_ends_its_threads(checkpoint):
    tensors = convert(plan_conversion(checkpoint, "int8"), "cpu")
    next(tensors)
    tensors.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("intelligent-vram")]


def test_what_a_killed_run_left_is_replaced(checkpoint, target):
    part = target.with_name("made.safetensors.part")
    part.write_bytes(b"half" * 1_000_000)
    into_file(plan_conversion(checkpoint, "int8"), target, "cpu")
    assert [*target.parent.iterdir()] == [target]
    assert len(load_file(target)) == len(plan_conversion(checkpoint, "int8").outputs)
