"""Encoding and decoding on a CPU: bit for bit, and never outside of what there is."""

import contextlib
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram.codec import Chunks, Corrupt, NoCodec, codec_for, codec_named, kind_of, read_chunks, room_for

from .conftest import DTYPES, KINDS, bytes_of, weights

CPU = codec_for(torch.device("cpu"))


def encoded(plain: torch.Tensor, kind: str, chunk: int, room: int | None = None) -> tuple[torch.Tensor, Chunks] | None:
    target = torch.zeros(2 * len(plain) + 4096 if room is None else room, dtype=torch.uint8)
    chunks = CPU.encode(plain, kind, target, chunk)
    return None if chunks is None else (target[: chunks.encoded], chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 256), (1,), (3,), (129, 65), (0, 4)], ids=str)
def test_what_comes_back_is_what_went_in(kind, dtype, shape):
    plain = bytes_of(weights(kind, shape, dtype))
    data, chunks = encoded(plain, kind_of(dtype), 4096)
    again = torch.zeros_like(plain)
    CPU.decode(data, read_chunks(data, len(plain), 4096, "w"), again)
    assert torch.equal(again, plain)
    assert chunks.nbytes == len(plain)


@given(
    st.binary(max_size=5000), st.sampled_from([16, 64, 1024, 1 << 20]), st.sampled_from(["bytes", "float16", "e4m3"])
)
def test_any_bytes_in_any_chunks_come_back(data, chunk, kind):
    plain = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    result, _ = encoded(plain, kind, chunk)
    again = torch.zeros_like(plain)
    CPU.decode(result, read_chunks(result, len(plain), chunk, "w"), again)
    assert torch.equal(again, plain)


def test_weights_of_a_model_get_smaller_and_noise_is_left_as_it_is():
    for dtype, share in ((torch.bfloat16, 0.75), (torch.float16, 0.95), (torch.float8_e4m3fn, 0.95)):
        plain = bytes_of(weights("trained", (512, 512), dtype))
        assert encoded(plain, kind_of(dtype), 65536)[1].encoded < share * len(plain)
    noise = bytes_of(weights("noise", (512, 512), torch.bfloat16))
    assert encoded(noise, "float16", 65536, room_for(len(noise))) is None


def test_a_unit_is_decoded_at_once_into_its_places():
    parts = [bytes_of(weights("trained", (size,), torch.bfloat16)) for size in (300, 5000, 1)]
    source, places, at, to = torch.zeros(40000, dtype=torch.uint8), [], 0, 0
    for part in parts:
        data, chunks = encoded(part, "float16", 1024)
        source[at : at + len(data)] = data
        places.append((at, to, chunks))
        at, to = at + len(data), to + 512 * (len(part) // 512 + 1)
    target = torch.full((to,), 7, dtype=torch.uint8)
    (batch,) = CPU.batches([places])
    batch.decode(source, target, None, None)
    batch.forget()
    for (_, begin, _), part in zip(places, parts, strict=True):
        assert torch.equal(target[begin : begin + len(part)], part)


# -- damage --------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_damaged_bytes_never_make_it_write_outside_of_its_target(data):
    plain = bytes_of(weights("trained", (40, 40), torch.bfloat16))
    good, _ = encoded(plain, "float16", 1024)
    bad = good.clone()
    for _ in range(data.draw(st.integers(1, 20))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    around = torch.full((len(plain) + 64,), 9, dtype=torch.uint8)
    with contextlib.suppress(Corrupt):
        found = read_chunks(bad, len(plain), 1024, "blocks.0.weight")
        CPU.decode(bad, found, around[32:-32], "blocks.0.weight")
    assert around[:32].eq(9).all()
    assert around[-32:].eq(9).all()


@pytest.mark.parametrize(
    ("nbytes", "chunk", "words"),
    [
        (3200, 1024, "take"),  # of another size
        (3201, 1000, "multiples"),
        (-2, 1024, "impossible"),
        (3200, 0, "impossible"),
        (3200, 1 << 30, "impossible"),
        (3200.0, 1024, "impossible"),
        (1 << 40, 16, "fewer than the table"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(nbytes, chunk, words):
    data, _ = encoded(bytes_of(weights("trained", (40, 40), torch.bfloat16)), "float16", 1024)
    with pytest.raises(Corrupt, match=f"blocks.0.weight.*{words}"):
        read_chunks(data[:-16] if words == "take" else data, nbytes, chunk, "blocks.0.weight")


def test_a_chunk_that_says_it_is_larger_than_it_may_be_is_refused():
    bomb = zlib.compress(bytes(1 << 24))
    head = bytes([1]) + len(bomb).to_bytes(4, "little") + bomb
    data = torch.zeros(16 + -(-len(head) // 16) * 16, dtype=torch.uint8)
    data[:4] = torch.frombuffer(bytearray(len(head).to_bytes(4, "little")), dtype=torch.uint8)
    data[16 : 16 + len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    with pytest.raises(Corrupt, match="another size"):
        CPU.decode(data, read_chunks(data, 1000, 1024, "w"), torch.zeros(1000, dtype=torch.uint8), "w")


def test_an_unknown_codec_and_one_whose_device_is_missing_say_what_to_do(monkeypatch):
    with pytest.raises(NoCodec, match="update"):
        codec_named("brotli9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoCodec, match="NVIDIA GPU"):
        codec_named("nvcomp6-ans")
