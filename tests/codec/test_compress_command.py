"""``intelligent-vram compress``: smaller files that any safetensors reader opens, and the same file back to the byte."""

import json

import pytest
import torch
from intelligent_vram.cli.main import main
from intelligent_vram.vram.encoded import EncodedTensor
from intelligent_vram.vram.encoded_file import KEY, VERSION, load_encoded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import bytes_of, weights


def checkpoint(path):
    tensors = {
        "blocks.0.weight": weights("trained", (256, 128), torch.bfloat16),
        "blocks.0.bias": weights("trained", (256,), torch.bfloat16),
        "blocks.1.weight": weights("trained", (256, 128), torch.float8_e4m3fn),
        "blocks.1.scale": torch.tensor(0.5),
        "blocks.2.weight": weights("trained", (256, 128), torch.int8),
        "head.weight": weights("nan and inf", (130, 129), torch.float16),
        "noise": weights("noise", (128, 128), torch.bfloat16),
        "flag": torch.tensor([True]),
        "none": torch.empty(0, 4),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, path, {"format": "pt", "made of": '{"a": "é"}'})
    return tensors


@pytest.fixture
def compress(capsys):
    """Runs the command: its exit status, output and errors."""

    def call(*arguments):
        try:
            status = main(["compress", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def files(compress, tmp_path):
    plain, packed = tmp_path / "plain.safetensors", tmp_path / "packed.safetensors"
    tensors = checkpoint(plain)
    status, printed, _ = compress(plain, packed, "--device", "cpu")
    assert status == 0
    assert "tensors encoded" in printed
    return plain, packed, tensors


def test_the_encoded_file_is_smaller_and_the_safetensors_library_opens_it(files):
    plain, packed, tensors = files
    assert packed.stat().st_size < 0.9 * plain.stat().st_size
    stored = load_file(packed)
    assert stored.keys() == tensors.keys()
    assert stored["blocks.0.weight"].dtype == torch.uint8
    assert torch.equal(bytes_of(stored["noise"]), bytes_of(tensors["noise"]))
    with safe_open(packed, "pt") as file:
        metadata = file.metadata()
    assert metadata["made of"] == '{"a": "é"}'
    entry = json.loads(metadata[KEY])["tensors"]["blocks.0.weight"]
    assert entry.keys() == {"codec", "chunk", "checksum", "sha256"}


def test_decompressing_gives_the_file_back_to_the_byte(files, compress, tmp_path):
    plain, packed, _ = files
    again = tmp_path / "again.safetensors"
    status, printed, _ = compress(packed, again, "--decompress")
    assert status == 0
    assert "again.safetensors" in printed
    assert again.read_bytes() == plain.read_bytes()


def test_its_tensors_load_encoded_and_read_as_the_plain_ones(files):
    _, packed, tensors = files
    loaded, file = load_encoded(packed)
    assert {name for name, tensor in loaded.items() if isinstance(tensor, EncodedTensor)} == file.encoded.keys()
    assert "blocks.0.weight" in file.encoded
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(bytes_of(loaded[name].clone()), bytes_of(tensor))


def test_a_check_passes_for_a_whole_file_and_names_the_tensor_that_is_damaged(files, compress, tmp_path):
    _, packed, _ = files
    assert compress(packed, "--check")[0] == 0
    with safe_open(packed, "pt") as file:
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    damaged = tmp_path / "damaged.safetensors"
    for position in (0, 40, len(stored["blocks.0.weight"]) // 2, -1):
        bad = stored["blocks.0.weight"].clone()
        bad[position] ^= 0x55
        save_file({**stored, "blocks.0.weight": bad}, damaged, metadata)
        status, _, said = compress(damaged, "--check")
        assert status == 1
        assert "blocks.0.weight is damaged" in said
        status, _, said = compress(damaged, tmp_path / "o.safetensors", "--decompress")
        assert status == 1
        assert "blocks.0.weight is damaged" in said
        assert not (tmp_path / "o.safetensors").exists()


def test_a_hash_that_is_not_that_of_the_plain_weights_is_found(files, compress, tmp_path):
    status, said = check_with(files, compress, tmp_path, lambda entry: entry.update(sha256="0" * 64))
    assert status == 1
    assert "blocks.0.weight is damaged: decoded" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(chunk=0),
        lambda entry: entry.update(chunk="many"),
        lambda entry: entry.update(chunk=1 << 40),
        lambda entry: entry.update(codec=3),
        lambda entry: entry.pop("checksum"),
        lambda entry: entry.update(chunk=48),
    ],
)
def test_metadata_that_cannot_be_is_refused_by_the_tensors_name(change, files, compress, tmp_path):
    status, said = check_with(files, compress, tmp_path, change)
    assert status == 1
    assert "blocks.0.weight" in said


def check_with(files, compress, tmp_path, change):
    _, packed, _ = files
    with safe_open(packed, "pt") as file:
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    described = json.loads(metadata[KEY])
    change(described["tensors"]["blocks.0.weight"])
    save_file(stored, tmp_path / "changed.safetensors", {**metadata, KEY: json.dumps(described)})
    status, _, said = compress(tmp_path / "changed.safetensors", "--check")
    return status, said


def test_a_file_of_another_version_or_with_other_tensors_is_refused(files, compress, tmp_path):
    _, packed, _ = files
    with safe_open(packed, "pt") as file:
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    described = json.loads(metadata[KEY])
    for change, words in (
        ({"version": VERSION + 1}, "update"),
        ({"version": 1}, "compress the plain file again"),
        ({"header": "{}"}, "not those of"),
        ({"tensors": 3}, "damaged"),
    ):
        save_file(stored, tmp_path / "changed.safetensors", {**metadata, KEY: json.dumps({**described, **change})})
        status, _, said = compress(tmp_path / "changed.safetensors", "--check")
        assert status == 1
        assert words in said


def test_what_cannot_be_done_is_said_and_leaves_nothing(files, compress, tmp_path):
    plain, packed, _ = files
    other = tmp_path / "other.safetensors"
    for arguments, status, words in (
        ((packed, other, "--device", "cpu"), 1, "encoded already"),
        ((plain, other, "--decompress"), 2, "no encoded tensors"),
        ((plain, packed, "--device", "cpu"), 2, "exists already"),
        ((plain,), 2, "OUT is missing"),
        ((packed, other, "--check"), 2, "takes one file"),
        ((tmp_path / "missing.safetensors", other), 1, "could not be read"),
        ((plain, tmp_path / "folder" / "o.safetensors", "--device", "cpu"), 2, "no folder"),
    ):
        got, _, said = compress(*arguments)
        assert (got, words in said) == (status, True), said
        assert not other.exists()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(packed.read_bytes()[:-8])
    status, _, said = compress(cut, "--check")
    assert (status, "bytes instead of" in said) == (1, True)
