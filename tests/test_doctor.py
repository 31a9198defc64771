"""``intelligent-vram doctor``: what it says of real files and of loaded models, checked against what safetensors and torch do
with the same files and weights."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from intelligent_vram.cli.main import main
from intelligent_vram.vram.inspect_weights import (
    COLUMN_MAJOR,
    FP8,
    ROW_MAJOR,
    Facts,
    Report,
    Unreadable,
    check_fp8,
    fp8_weights,
    inspect_module,
)
from intelligent_vram.vram.model_files import inspect_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

E4M3 = torch.float8_e4m3fn
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": E4M3}


def write(path: Path, *tensors: tuple, ends_at: int = 0, metadata: dict | None = None, size: int | None = None) -> Path:
    """A safetensors file of (name, dtype, shape[, begin, end]), one after the other where begin and end are not given. Its
    header ends ``ends_at`` bytes past a multiple of 16; ``size`` is that of its data, by default what the tensors fill."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    filled = 0
    for name, dtype, shape, *place in tensors:
        nbytes = math.prod(shape) * NAMES[dtype].itemsize
        begin, end = place or (filled, filled + nbytes)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        filled = max(filled, end)
    encoded = json.dumps(header).encode()
    encoded += b" " * ((ends_at - 8 - len(encoded)) % 16)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(filled if size is None else size))
    return path


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def headed(encoded: bytes) -> bytes:
    """A header of safetensors with its length before it."""
    return len(encoded).to_bytes(8, "little") + encoded


def kinds(report: Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for issue in report.issues:
        found.setdefault(issue.kind, []).append(issue.path)
    return found


def accepted(rows: int, columns: int, layout: str = ROW_MAJOR, scale: tuple[int, ...] = ()) -> bool:
    """Whether a layer with such a weight computes in FP8: torch's own checks for CUDA, on the meta device."""
    weight = torch.empty(rows, columns, dtype=E4M3, device="meta")
    if layout == COLUMN_MAJOR:
        weight = torch.empty(columns, rows, dtype=E4M3, device="meta").t()
    one = torch.ones((), device="meta")
    first = torch.empty(5, columns, dtype=E4M3, device="meta")
    try:
        torch._scaled_mm(first, weight.t(), one, torch.ones(scale, device="meta"), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_a_good_file_has_nothing(tmp_path):
    report = inspect_file(write(tmp_path / "a.safetensors", ("w", "F32", (8, 8)), ("b", "F32", (8,))))
    assert report.issues == ()
    assert (report.form, report.tensors, report.nbytes) == ("safetensors", 2, 288)


@pytest.mark.parametrize("ends_at", [0, 4, 8, 12])
def test_a_note_names_the_tensors_that_are_mapped_to_misaligned_addresses(tmp_path, ends_at):
    path = write(
        tmp_path / "a.safetensors", ("w", "F32", (8, 8)), ("b", "F32", (3,)), ("c", "F32", (2,)), ends_at=ends_at
    )
    with safe_open(path, "pt") as file:
        mapped = {name for name in file.keys() if file.get_tensor(name).data_ptr() % 16}  # noqa: SIM118
        moved = {name for name in file.keys() if file.get_tensor(name).to("cpu", copy=True).data_ptr() % 16}  # noqa: SIM118
    report = inspect_file(path)
    assert set(kinds(report).get("mapped_misaligned", ())) == mapped
    assert not moved
    assert report.faults == 0


def test_what_the_safetensors_library_writes_is_never_at_fault(tmp_path):
    weights = {"w": torch.randn(8, 8), "b": torch.randn(3).bfloat16(), "f8": torch.zeros(16, 16).to(E4M3)}
    for length in range(1, 9):
        path = tmp_path / f"{length}.safetensors"
        save_file({name * length: weight for name, weight in weights.items()}, path)
        assert inspect_file(path).faults == 0


def test_a_header_of_odd_length_splits_elements(tmp_path):
    path = write(tmp_path / "a.safetensors", ("w", "F32", (8, 8)), ("f8", "F8_E4M3", (16, 16)), ends_at=1)
    assert kinds(inspect_file(path)) == {"split_elements": ["w"], "mapped_misaligned": ["f8"]}


@pytest.mark.parametrize(
    ("tensors", "size", "expected"),
    [
        ([("w", "F32", (8, 8)), ("b", "F32", (8,))], 280, {"cut_off": ["b"]}),
        ([("w", "F32", (8, 8)), ("b", "F32", (8,))], 100, {"cut_off": ["w", "b"]}),
        ([("w", "F32", (8, 8)), ("b", "F32", (8,))], 290, {"gap": ["(end of the file)"]}),
        ([("w", "F32", (8, 8)), ("b", "F32", (8,), 272, 304)], None, {"gap": ["b"]}),
        ([("w", "F32", (8, 8)), ("b", "F32", (8,), 240, 272)], None, {"overlap": ["b"]}),
        ([("w", "F32", (8, 8), 0, 240)], None, {"malformed": ["w"]}),
        ([("w", "F32", (-2, -2), 0, 16)], None, {"malformed": ["w"]}),
        ([("w", "F32", (2**40, 2**40), 0, 16)], None, {"malformed": ["w"]}),
    ],
    ids=["cut in the last", "cut in the first", "bytes after", "bytes between", "overlap", "size", "negative", "huge"],
)
def test_a_broken_file_is_at_fault_and_safetensors_refuses_it_too(tmp_path, tensors, size, expected):
    path = write(tmp_path / "a.safetensors", *tensors, size=size)
    assert kinds(inspect_file(path)) == expected
    assert inspect_file(path).faults == sum(map(len, expected.values()))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_a_file_of_any_size_is_inspected_by_its_header(tmp_path):
    path = write(tmp_path / "a.safetensors", ("w", "BF16", (1 << 16, 1 << 15), 0, 1 << 32), size=0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 32))
    assert inspect_file(path).nbytes == 1 << 32
    assert not inspect_file(path).issues
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert kinds(inspect_file(path)) == {"cut_off": ["w"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        ((1000).to_bytes(8, "little") + b'{"w": {"dtype"', "ends inside its header, at 22 of 1008 bytes"),
        ((9).to_bytes(8, "little") + b"not json!", "not one of safetensors"),
        ((2).to_bytes(8, "little") + b"[]", "not one of safetensors"),
        ((22).to_bytes(8, "little") + b'{"w": {"dtype":"F32"}}', "not one of safetensors"),
        (headed(b"[" * 200_000 + b"]" * 200_000), "not one of safetensors"),
        (headed(b'{"a":' * 100_000), "not one of safetensors"),
        (headed(b'{"w":%s,"w":%s}' % (ENTRY, ENTRY)) + bytes(4), "the name w is twice in it"),
        (headed(b'{"w":%s,"\\u0077":%s}' % (ENTRY, ENTRY)) + bytes(4), "the name w is twice in it"),
        (headed(b'{"w":%s}' % ENTRY.replace(b"4]", b"4,4]")) + bytes(4), "not one of safetensors"),
        (headed(b'{"w":%s}' % ENTRY.replace(b"4]", b"4.0]")) + bytes(4), "4.0 is no whole number"),
        (headed(b'{"w":%s}' % ENTRY.replace(b"[1]", b"[1e999]")) + bytes(4), "inf is no whole number"),
        (headed(b'{"w":%s}' % ENTRY.replace(b"[1]", b"[true]")) + bytes(4), "True is no whole number"),
        (
            headed(b'{"w":%s}' % ENTRY.replace(b"[1]", b"[1%s]" % (b"0" * 4000))) + bytes(4),
            "is no whole number of 64 bits",
        ),
    ],
    ids=[
        *("empty", "LFS", "HTML", "cut in the header", "not JSON", "a list", "no offsets", "nested", "nested objects"),
        *(
            "a name twice",
            "a name twice, written otherwise",
            "three offsets",
            "a fraction",
            "infinity",
            "true",
            "4000 digits",
        ),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=message):
        inspect_file(path)


# -- FP8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (24, 64), (64, 24), (16, 16), (8, 8)])
def test_fp8_dimensions_are_at_fault_where_torch_refuses_them(tmp_path, rows, columns):
    report = inspect_file(write(tmp_path / "a.safetensors", ("blocks.0.q.weight", "F8_E4M3", (rows, columns))))
    (weight,) = report.fp8
    assert weight.divisible == accepted(rows, columns)
    assert kinds(report).get("fp8_dimensions", []) == ([] if accepted(rows, columns) else ["blocks.0.q.weight"])


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("layout", [ROW_MAJOR, COLUMN_MAJOR])
def test_the_operand_of_a_weight_is_what_torch_takes(dtype, layout):
    weight = torch.zeros(32, 64).to(getattr(torch, dtype))
    weight = weight if layout == ROW_MAJOR else weight.t().contiguous().t()
    report = inspect_module(linear(weight))
    (found,) = report.fp8
    assert (found.layout, found.shape, found.dtype) == (layout, (32, 64), dtype)
    assert ("fp8_column_major" in kinds(report)) == (not accepted(32, 64, layout))


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_scales_of_both_names_are_found(tmp_path, name):
    path = write(tmp_path / "a.safetensors", ("l.weight", "F8_E4M3", (16, 16)), (f"l.{name}", "F32", ()))
    (weight,) = inspect_file(path).fp8
    assert (weight.scale, weight.scale_dtype, weight.scale_shape) == (f"l.{name}", "float32", ())


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ([("m.weight", "F8_E4M3", (16, 16)), ("m.scale_weight", "F32", ())], None),
        ([("l.comfy_quant", "F8_E4M3", (0,))], None),
        ([("scaled_fp8", "F8_E4M3", (0,))], None),
        ([], {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})}),
    ],
    ids=["others have one", "comfy_quant", "scaled_fp8", "_quantization_metadata"],
)
def test_a_scale_that_is_missing_is_a_fault_where_one_was_promised(tmp_path, tensors, metadata):
    weight = ("l.weight", "F8_E4M3", (16, 16))
    report = inspect_file(write(tmp_path / "a.safetensors", weight, *tensors, metadata=metadata))
    assert kinds(report)["fp8_no_scale"] == ["l.weight"]
    whole = write(tmp_path / "b.safetensors", weight, *tensors, ("l.weight_scale", "F32", ()), metadata=metadata)
    assert "fp8_no_scale" not in kinds(inspect_file(whole))


def test_metadata_that_is_not_comfyui_s_is_refused(tmp_path):
    for number, text in enumerate(("[", "[" * 200_000, '{"layers": 3}')):
        path = write(tmp_path / f"{number}.safetensors", metadata={"_quantization_metadata": text})
        with pytest.raises(Unreadable, match="_quantization_metadata is not ComfyUI's"):
            inspect_file(path)


def test_fp8_weights_that_were_only_cast_have_no_scales_and_no_fault(tmp_path):
    path = write(tmp_path / "a.safetensors", ("l.weight", "F8_E4M3", (16, 16)), ("m.weight", "F8_E4M3", (16, 16)))
    assert inspect_file(path).issues == ()


def test_scales_that_torch_does_not_take_as_they_are_get_a_note():
    facts = {
        "a.weight": Facts("float8_e4m3fn", (32, 64)),
        "a.weight_scale": Facts("bfloat16", ()),
        "b.weight": Facts("float8_e4m3fn", (32, 64)),
        "b.weight_scale": Facts("float32", (32,)),
    }
    issues = list(check_fp8(fp8_weights(facts), {}))
    assert [(issue.path, issue.kind, issue.fault) for issue in issues] == [
        ("a.weight_scale", "fp8_scale_dtype", False),
        ("b.weight_scale", "fp8_scale_shape", False),
    ]
    assert accepted(32, 64, scale=())
    assert not accepted(32, 64, scale=(32,))


# -- loaded models -----------------------------------------------------------------------------------------------------


def linear(weight: torch.Tensor) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4, bias=False))
    module[0].weight = nn.Parameter(weight, requires_grad=False)
    return module


def test_a_sound_model_has_nothing():
    assert inspect_module(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).issues == ()


@pytest.mark.parametrize(
    ("weight", "kind", "fault"),
    [
        (torch.randn(8, 16).t(), "strided", True),
        (torch.randn(8, 16)[:, ::2], "strided", True),
        (torch.randn(65)[1:].view(8, 8), "misaligned_in_ram", False),
        (torch.zeros(16 * 32 + 1).to(E4M3)[1:].view(16, 32), "misaligned_in_ram", False),
    ],
    ids=["transposed", "strided", "misaligned", "misaligned FP8"],
)
def test_strided_and_misaligned_weights_of_a_model_are_named(weight, kind, fault):
    report = inspect_module(linear(weight))
    assert kinds(report) == {kind: ["0.weight"]}
    assert report.faults == int(fault)


def test_a_transposed_weight_stays_so_when_it_is_moved_and_a_misaligned_one_does_not():
    """Why the one is a fault and the other, in RAM, is not."""
    transposed, misaligned = torch.randn(8, 16).t(), torch.randn(65)[1:].view(8, 8)
    assert transposed.to("meta").stride() == transposed.stride()
    assert misaligned.to("cpu", copy=True).data_ptr() % 16 == 0


def test_a_scale_that_hangs_on_a_layer_as_an_attribute_is_found():
    module = linear(torch.zeros(16, 16).to(E4M3))
    module[0].scale_weight = torch.ones((), dtype=torch.bfloat16)
    report = inspect_module(module)
    assert report.fp8[0].scale == "0.scale_weight"
    assert kinds(report) == {"fp8_scale_dtype": ["0.scale_weight"]}


def test_weights_on_the_meta_device_are_passed_by():
    assert inspect_module(nn.Linear(8, 8, device="meta")).tensors == 0


def test_comfyui_s_quantized_weights_are_looked_into():
    quantized = pytest.importorskip("comfy_kitchen.tensor")
    weight = quantized.QuantizedTensor.from_float(torch.randn(32, 24), "TensorCoreFP8Layout")
    report = inspect_module(linear(weight))
    (found,) = report.fp8
    assert (found.path, found.shape, found.scale, found.scale_dtype) == (
        "0.weight",
        (32, 24),
        "0.weight_scale",
        "float32",
    )
    assert kinds(report) == {"fp8_dimensions": ["0.weight"]}


# -- PyTorch and GGUF --------------------------------------------------------------------------------------------------


def test_a_file_of_torch_save_is_inspected_with_its_views(tmp_path):
    path = tmp_path / "a.pt"
    state = {"w": torch.randn(8, 8), "t": torch.randn(8, 8).t(), "v": torch.randn(65)[1:].view(8, 8)}
    torch.save({"state_dict": state, "step": 3}, path)
    report = inspect_file(path)
    assert kinds(report) == {"strided": ["state_dict.t"], "misaligned_in_ram": ["state_dict.v"]}
    assert report.tensors == 3


class Anything:
    """Not a tensor."""


def test_files_of_torch_save_that_cannot_be_mapped_or_trusted_are_refused(tmp_path):
    torch.save({"a": Anything()}, tmp_path / "object.ckpt")
    with pytest.raises(Unreadable, match="was not loaded"):
        inspect_file(tmp_path / "object.ckpt")
    torch.save({"a": torch.ones(4)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(Unreadable, match=r"since version 1\.6"):
        inspect_file(tmp_path / "old.pth")
    torch.save({"a": torch.ones(1000)}, tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    for cut in (60, 2000, len(whole) - 4, len(whole)):
        (tmp_path / "cut.pt").write_bytes(whole[:-cut])
        with pytest.raises(Unreadable, match="may be cut off"):
            inspect_file(tmp_path / "cut.pt")


def write_gguf(path: Path, *, shift: int = 0) -> Path:
    """GGUF version 3: two F32 tensors, the second ``shift`` bytes past the alignment of 32."""
    infos = bytearray()
    for name, offset in (("a.weight", 0), ("b.weight", 1024 + shift)):
        infos += np.uint64(len(name)).tobytes() + name.encode() + np.uint32(2).tobytes()
        infos += np.array([32, 8], np.uint64).tobytes() + np.uint32(0).tobytes() + np.uint64(offset).tobytes()
    head = b"GGUF" + np.uint32(3).tobytes() + np.array([2, 0], np.uint64).tobytes() + infos
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(2048 + shift))
    return path


def test_gguf_files_are_inspected(tmp_path):
    pytest.importorskip("gguf")
    report = inspect_file(write_gguf(tmp_path / "a.gguf"))
    assert (report.form, report.tensors, report.nbytes, report.issues) == ("GGUF", 2, 2048, ())
    assert kinds(inspect_file(write_gguf(tmp_path / "b.gguf", shift=8))) == {"split_elements": ["b.weight"]}


@pytest.mark.parametrize("length", [0, 10, 60, 1500])
def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path, length):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Unreadable, match=r"cut off|ends inside|no GGUF"):
        inspect_file(path)


def test_without_the_gguf_package_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Unreadable, match="pip install gguf"):
        inspect_file(write_gguf(tmp_path / "a.gguf"))


# -- the command -------------------------------------------------------------------------------------------------------


def doctor(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "intelligent_vram.cli.main", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_says_in_words_what_it_found(tmp_path):
    good = write(tmp_path / "good.safetensors", ("w", "F32", (8, 8)))
    tensors = [(f"blocks.{i}.weight", "F8_E4M3", (24, 32)) for i in range(9)]
    bad = write(tmp_path / "bad.safetensors", *tensors)
    result = doctor(good, bad, "--show", 2)
    assert result.returncode == 1
    assert f"{good}\n  file   safetensors, 1 tensor, 256 B\n  ok     no fault found" in result.stdout
    assert "FAULT  FP8 weights with a dimension that is no multiple of 16: 9" in result.stdout
    assert "blocks.1.weight: float8_e4m3fn of shape [24, 32]\n           and 7 more" in result.stdout
    assert "blocks.2.weight" not in result.stdout
    assert "9 weights in float8_e4m3fn, none with a scale; 0 of 9 with dimensions" in result.stdout


def test_the_exit_status_is_0_for_sound_files_1_for_faults_2_for_unread_ones(tmp_path):
    noted = write(tmp_path / "noted.safetensors", ("w", "F32", (8, 8)), ends_at=8)
    cut = write(tmp_path / "cut.safetensors", ("w", "F32", (8, 8)), size=100)
    assert main(["doctor", str(noted)]) == 0
    assert main(["doctor", str(noted), "--strict"]) == 1
    assert main(["doctor", str(noted), str(cut)]) == 1
    result = doctor(cut, tmp_path / "missing.safetensors", "--json")
    assert result.returncode == 2
    first, second = json.loads(result.stdout)["files"]
    assert (first["error"], first["faults"], first["findings"][0]["kind"]) == (None, 1, "cut_off")
    assert second == {"file": str(tmp_path / "missing.safetensors"), "error": "there is no such file"}


@pytest.mark.parametrize(("name", "message"), [(".", "it is a folder"), ("model.onnx", "no known format")])
def test_what_is_no_model_file_is_said_to_be_none(tmp_path, name, message):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(Unreadable, match=message):
        inspect_file(tmp_path / name)
