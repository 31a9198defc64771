"""Model files that somebody made up: read in words, refused in words, never a crash, a hang or all of the memory."""

from __future__ import annotations

import contextlib
import io
import json
import struct

import pytest
from hypothesis import strategies as st
from intelligent_vram.cli.main import main
from intelligent_vram.quant.convert import plan_conversion
from intelligent_vram.vram import SwapConfig
from intelligent_vram.vram.inspect_weights import Unreadable
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.model_files import SAFETENSORS_DTYPES

from .fuzzing import SECONDS, bounded, fuzz

# -- files ---------------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [f"{prefix}{name}" for prefix in ("", "model.diffusion_model.", "net.") for name in (
        "blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.comfy_quant", "blocks.1.self_attn.q.weight",
        "blocks.1.modulation", "blocks.99999999999.w", "double_blocks.0.img_attn.qkv.weight", "vace_blocks.0.ffn.0.weight",
        "patch_embedding.weight", "scaled_fp8", "text_embedding.0.weight", "head.modulation", "head.head.weight",
        "blocks.0.ffn.0.weight.absmax", "blocks.-1.w", "blocks..w", "blocks.0", "time_projection.1.weight",
    )]
) | st.text(max_size=24)  # fmt: skip
NUMBERS = st.integers(0, 64) | st.sampled_from([-1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LAYERS = st.dictionaries(NAMES, JUNK | st.just({"format": "float8_e4m3fn"}), max_size=3)
METADATA = st.dictionaries(
    st.sampled_from(["format", "_quantization_metadata", "modelspec.architecture"]) | st.text(max_size=8),
    st.text(max_size=16) | LAYERS.map(lambda layers: json.dumps({"layers": layers})) | JUNK,
    max_size=3,
)
DTYPES = st.sampled_from([*SAFETENSORS_DTYPES, "F1", ""]) | st.text(max_size=6)


@st.composite
def sound_entries(draw) -> dict[str, dict]:
    """Tensors as a file of them would have, one behind the other."""
    entries, end = {}, 0
    for name in draw(st.lists(NAMES, max_size=8, unique=True)):
        dtype = draw(st.sampled_from([*SAFETENSORS_DTYPES]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 16, 32]), max_size=3))
        size = SAFETENSORS_DTYPES[dtype][1]
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size // 8]}
        end += size // 8
    return entries


ENTRY = st.fixed_dictionaries(
    {
        "dtype": DTYPES | JUNK,
        "shape": st.lists(NUMBERS | JUNK, max_size=10) | JUNK,
        "data_offsets": st.lists(NUMBERS) | JUNK,
    }
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with a few bytes changed, cut off, or as it was."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(changed)) | st.just(len(changed)))])


@st.composite
def safetensors_files(draw) -> bytes:
    header = draw(sound_entries())
    header |= draw(st.dictionaries(NAMES, ENTRY | JUNK, max_size=2))
    if draw(st.booleans()):
        header["__metadata__"] = draw(METADATA | JUNK)
    text = json.dumps(header).encode()
    if draw(st.booleans()):
        text = draw(damaged(text))
    length = draw(st.just(len(text)) | NUMBERS.filter(lambda number: number < 2**64 and number >= 0))
    data = bytes(draw(st.sampled_from([0, 100, 20_000])))
    return draw(
        st.just(length.to_bytes(8, "little") + text + data) | damaged(length.to_bytes(8, "little") + text + data)
    )


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pack(form: str, number: int) -> bytes:
    """A number in as many bits as there are."""
    size = struct.calcsize(f"<{form}")
    return (number % (1 << 8 * size)).to_bytes(size, "little")


@st.composite
def gguf_values(draw) -> bytes:
    kind = draw(st.integers(0, 13))
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    if kind == 8:
        body = gguf_text(draw(st.binary(max_size=8)))
    elif kind == 9:
        inner, count = draw(st.integers(0, 13)), draw(st.integers(0, 9) | NUMBERS)
        body = pack("I", inner) + pack("Q", count) + bytes(sizes.get(inner, 8) * min(count % 2**64, 9))
    else:
        body = draw(st.binary(min_size=sizes.get(kind, 4), max_size=sizes.get(kind, 4)))
    return pack("I", kind) + body


@st.composite
def gguf_files(draw) -> bytes:
    fields = draw(st.lists(st.tuples(st.sampled_from([b"general.alignment", b"general.architecture", b"comfy.gguf.orig_shape.blocks.0.w", b"x"]), gguf_values()), max_size=3))  # fmt: skip
    content = b"".join(gguf_text(key) + value for key, value in fields)
    tensors = draw(st.lists(NAMES, max_size=4))
    start = 0
    for name in tensors:
        shape = draw(st.lists(st.sampled_from([1, 4, 32, 256]), max_size=4) | st.lists(NUMBERS, max_size=9))
        kind = draw(st.sampled_from([0, 1, 2, 8, 12, 30]) | st.integers(0, 45))
        content += gguf_text(name.encode("utf-8", "replace")) + pack("I", len(shape))
        content += b"".join(pack("Q", length) for length in shape)
        content += pack("I", kind) + pack("Q", draw(st.just(start) | NUMBERS))
        start += 4096
    counts = pack("Q", draw(st.just(len(tensors)) | NUMBERS)) + pack("Q", draw(st.just(len(fields)) | NUMBERS))
    whole = b"GGUF" + pack("I", draw(st.sampled_from([3, 3, 3, 2, 1, 4]))) + counts + content
    return draw(damaged(whole + bytes(draw(st.sampled_from([0, 31, 20_000])))))


# -- what reads them -----------------------------------------------------------------------------------------------------


def plan(path):
    """What the engine plans with."""
    facts = read_model(path)
    assert facts.description
    assert facts.total_bytes >= 0
    if facts.blocks:
        assert facts.layers(SwapConfig(mode="layerwise")).packed_bytes >= 0


def doctor(path):
    """The command, in both of its forms."""
    for more in ([], ["--json"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            assert main(["doctor", str(path), *more]) in (0, 1, 2)
        assert out.getvalue()


def convert(path):
    """What is quantized, and what is passed on."""
    for quantization in ("int8", "fp8_e4m3fn", "none"):
        with contextlib.suppress(Unreadable):
            assert plan_conversion(path, quantization).nbytes >= 0


READERS = {"plan": plan, "doctor": doctor, "convert": convert}


def read(path, content, *readers):
    """Read a file in all ways. Only what the functions say that they raise may come out of them."""
    path.write_bytes(content)
    for reader in readers:
        with bounded(), contextlib.suppress(Unreadable):
            reader(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder, with all modules imported whose memory is not to count."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for name in ("warm.safetensors", "warm.gguf"):
        (folder / name).write_bytes(b"")
        for reader in READERS.values():
            with contextlib.suppress(Unreadable):
                reader(folder / name)
    return folder


def test_fuzzed_safetensors_headers_are_read_or_refused_in_words(folder):
    path = folder / "made_up.safetensors"
    count = fuzz(lambda content: read(path, content, *READERS.values()), 0.35, content=safetensors_files())
    assert count >= min(100, SECONDS)


def test_fuzzed_gguf_headers_are_read_or_refused_in_words(folder):
    pytest.importorskip("gguf")
    path = folder / "made_up.gguf"
    count = fuzz(lambda content: read(path, content, *READERS.values()), 0.3, content=gguf_files())
    assert count >= min(100, SECONDS)


def test_an_array_without_end_in_a_short_gguf_file_is_refused_at_once(folder):
    """The gguf package would follow the length that the file claims; found by atheris_headers.py."""
    pytest.importorskip("gguf")
    array = pack("I", 9) + pack("I", 0) + pack("Q", 1 << 46)
    read(
        folder / "array.gguf",
        b"GGUF" + pack("I", 3) + pack("Q", 1) + pack("Q", 1) + gguf_text(b"") + array,
        *READERS.values(),
    )


@pytest.mark.parametrize("name", ["made_up.safetensors", "made_up.gguf", "made_up.ckpt", "made_up.txt"])
def test_fuzzed_bytes_of_any_kind_are_refused_in_words(folder, name):
    path = folder / name
    heads = st.sampled_from([b"", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04", b"\x80\x02", b"\x10" + bytes(7), b"<html>"])
    content = st.tuples(heads, st.binary(max_size=200)).map(b"".join)
    fuzz(lambda content: read(path, content, *READERS.values()), 0.02, content=content)
