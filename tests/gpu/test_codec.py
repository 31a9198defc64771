"""Lossless coding by nvCOMP on a real GPU: bit for bit, in place, and nothing outside of it."""

import math

import pytest
import torch
from intelligent_vram.vram.codec import (
    CHUNK,
    KINDS,
    Chunks,
    Corrupt,
    NoCodec,
    codec_for,
    kind_of,
    read_chunks,
    room_for,
)
from intelligent_vram.vram.encoded import EncodedTensor, checksum_of
from intelligent_vram.vram.units import MIB

from .conftest import WITH_CODEC

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


pytestmark = WITH_CODEC


@pytest.fixture(scope="module")
def codec():
    return codec_for(torch.device("cuda"))


def of_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = values.abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30)
    if dtype == torch.int8:
        return (values / scale * 127).nan_to_num(0).round().to(dtype)
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return (values / scale * torch.finfo(dtype).max).to(dtype)
    return values.to(dtype)


def weights(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """uint8 [n] on the GPU: the bytes of such weights."""
    torch.manual_seed(4)
    count, size = math.prod(shape), torch.empty(0, dtype=dtype).element_size()
    if kind == "noise":
        return torch.randint(0, 256, (count * size,), dtype=torch.uint8, device="cuda")
    values = torch.randn(count, device="cuda") * 0.02
    if kind == "zeros":
        values.zero_()
    if kind == "trained":
        values *= torch.exp(0.5 * torch.randn(-(-count // 64), device="cuda")).repeat_interleave(64)[:count]
    if kind == "nan and inf":
        values[::3], values[1::5], values[2::7] = float("nan"), float("inf"), -float("inf")
    if kind == "denormals" and dtype.is_floating_point:
        values *= torch.finfo(dtype).tiny
    return of_dtype(values, dtype).view(torch.uint8)


def encoded(codec, plain: torch.Tensor, kind: str, chunk: int = CHUNK) -> tuple[torch.Tensor, Chunks]:
    target = torch.zeros((2 * chunk + 1024) * (len(plain) // chunk + 1), dtype=torch.uint8)
    chunks = codec.encode(plain, kind, target, chunk)
    return target[: chunks.encoded], chunks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "trained", "nan and inf", "denormals", "zeros", "noise"])
@pytest.mark.parametrize("shape", [(1024, 1024), (1,), (3,), (1029, 65), (40 * MIB,)], ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_comes_back_is_what_went_in(codec, kind, dtype, shape, device):
    if device == "cpu" and shape == (40 * MIB,) and kind != "trained":
        pytest.skip("large ones are slow on their way through host memory, and no different")
    plain = weights(kind, shape, dtype)
    data, _ = encoded(codec, plain.to(device), kind_of(dtype))
    chunks = read_chunks(data, len(plain), CHUNK, "w")
    for source in (data, data.cuda()):
        again = torch.full_like(plain, 7, device=device)
        codec.decode(source, chunks, again)
        assert torch.equal(again.cuda(), plain)


@pytest.mark.parametrize("chunk", [16, 4096, CHUNK, 1 << 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [2, 30, 4096, 100002, 3 * MIB + 2])
def test_every_chunk_size_and_any_length(codec, chunk, kind, nbytes):
    if nbytes // chunk > 10000:
        pytest.skip("more chunks than anybody makes")
    plain = weights("trained", (nbytes // 2,), torch.bfloat16)
    data, chunks = encoded(codec, plain, kind, chunk)
    again = torch.zeros_like(plain)
    codec.decode(data, chunks, again)
    assert torch.equal(again, plain)


def test_noise_is_not_worth_it_and_bf16_is(codec):
    noise = weights("noise", (1024, 1024), torch.bfloat16)
    assert codec.encode(noise, "float16", torch.zeros(room_for(len(noise)), dtype=torch.uint8)) is None
    for dtype, most in ((torch.bfloat16, 0.69), (torch.float8_e4m3fn, 0.86)):
        plain = weights("trained", (5120, 5120), dtype)
        assert encoded(codec, plain, kind_of(dtype))[1].encoded <= most * len(plain)


def test_units_whose_tables_came_together_are_decoded_each_for_itself(codec):
    units = [(), (300,), (1000, 3 * MIB), (), (1, 700000, 5)]
    parts = [[weights("trained", (size,), torch.bfloat16) for size in sizes] for sizes in units]
    coded = [[encoded(codec, part, "float16") for part in unit] for unit in parts]
    sources, places = [], []
    for unit in coded:
        sources.append(torch.cat([torch.zeros(0, dtype=torch.uint8), *(data for data, _ in unit)]).cuda())
        starts = [sum(len(data) for data, _ in unit[:number]) for number in range(len(unit))]
        places.append(
            [(at, number * 8 * MIB, chunks) for number, (at, (_, chunks)) in enumerate(zip(starts, unit, strict=True))]
        )
    for batch, source, unit in zip(codec.batches(places), sources, parts, strict=True):
        target = torch.empty(8 * MIB * max(1, len(unit)), dtype=torch.uint8, device="cuda")
        batch.decode(source, target, None, torch.cuda.current_stream())
        assert batch.damaged() is None
        for number, part in enumerate(unit):
            assert torch.equal(target[number * 8 * MIB :][: len(part)].cpu(), part.cpu())


def test_a_unit_is_decoded_by_one_call_that_does_not_wait_and_allocates_nothing(codec):
    parts = [weights("trained", (size,), torch.bfloat16) for size in (1000, 5 * MIB, 1, 300000)]
    source, places, at, to = torch.zeros(16 * MIB, dtype=torch.uint8), [], 0, 0
    for part in parts:
        data, chunks = encoded(codec, part, "float16")
        source[at : at + len(data)] = data
        places.append((at, to, chunks))
        at, to = at + len(data), to + 512 * (len(part) // 512 + 1)
    source, target = source.cuda(), torch.full((to,), 7, dtype=torch.uint8, device="cuda")
    (batch,), stream = codec.batches([places]), torch.cuda.Stream()
    torch.cuda.synchronize()
    batch.decode(source, target, "slot", stream)
    torch.cuda.synchronize()
    target.fill_(7)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    batch.decode(source, target, "slot", stream)
    assert not stream.query()  # the host came back before the device was done
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()
    for (_, begin, _), part in zip(places, parts, strict=True):
        assert torch.equal(target[begin : begin + len(part)], part)
    assert batch.damaged() is None


@pytest.mark.parametrize("position", [0, 700, -1])
def test_damaged_bytes_of_a_file_are_refused_before_the_decoder_sees_them(codec, position):
    """nvCOMP trusts what it decodes: it has been seen to read outside of its buffers for damaged bytes."""
    plain = weights("trained", (1024, 1024), torch.bfloat16).view(torch.bfloat16).view(1024, 1024)
    data, _ = encoded(codec, plain.view(-1).view(torch.uint8), "float16")
    checksum = checksum_of(data)
    data[position] ^= 0x55
    tensor = EncodedTensor(
        data, plain.dtype, plain.shape, plain.stride(), codec.name, CHUNK, "blocks.0.weight", checksum
    )
    with pytest.raises(Corrupt, match=r"blocks\.0\.weight is damaged"):
        tensor.cuda()
    torch.cuda.synchronize()


def test_an_encoded_tensor_reads_as_the_plain_one_on_either_side(codec):
    plain = weights("trained", (512, 512), torch.bfloat16).view(torch.bfloat16).view(512, 512)
    data, _ = encoded(codec, plain.view(-1).view(torch.uint8), "float16")
    for device in ("cpu", "cuda"):
        tensor = EncodedTensor(data.to(device), plain.dtype, plain.shape, plain.stride(), codec.name, CHUNK, "w")
        assert torch.equal(tensor.float(), plain.to(device).float())
        assert torch.equal(tensor.to("cuda"), plain)


def test_another_version_of_nvcomp_is_refused_with_what_to_install(codec, monkeypatch):
    from intelligent_vram.vram import codec_nvcomp

    monkeypatch.setattr(codec_nvcomp, "MAJOR", 7)
    codec_nvcomp.library.cache_clear()
    try:
        with pytest.raises(NoCodec, match=r"nvCOMP 6\.0 is installed.*pip install"):
            codec_nvcomp.library()
    finally:
        monkeypatch.undo()
        codec_nvcomp.library.cache_clear()
        codec_nvcomp.library()
