"""Lossless coding on an NVIDIA GPU: the ANS coder of nvCOMP 6, through its C interface.

nvCOMP knows 16-bit floats and FP8 by itself: it codes the bytes that hold the exponent and leaves the others alone, in one
kernel each way, so that nothing has to be split or joined and decoding needs no memory beside its source and its target.
Everything is queued on a stream; the host calls once for a whole unit. What the Python package nvidia-nvcomp adds (its own
arrays, its own container) is not used. Interface: nvcomp/ans.h of the package nvidia-libnvcomp.

nvCOMP trusts what it decodes, and has been seen to read outside of its buffers for damaged bytes: what comes from a file is
compared with its checksum before (EncodedTensor.verify). That finds damage, not malice.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy
import torch

from .codec import ALIGNMENT, BYTES, CHUNK, E4M3, FLOAT16, Chunks, Corrupt, NoCodec, Part, count_of, padded, table_bytes
from .host_memory import HostSegment
from .page_lock import registrar_for
from .units import MIB

NAME = "nvcomp6-ans"
MAJOR = 6
FEW = MIB  # bytes that are copied from pageable memory
PIECE = 16 * MIB  # plain bytes that are encoded, or decoded into host memory, at once
BACKEND_CUDA = 2
TYPE_BITS = 0xFF  # for decoding: as the encoded bytes say
TYPES = {BYTES: 1, E4M3: 9, FLOAT16: 10}  # nvcompType_t


class _CompressOptions(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("histogram_reduction_log2", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


class _DecompressOptions(ctypes.Structure):
    _fields_ = (
        ("backend", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("skip_validate", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


class _Properties(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("cudart", ctypes.c_uint32))


log = logging.getLogger(__name__)

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_DECODING = _DecompressOptions(backend=BACKEND_CUDA, data_type=TYPE_BITS)


def package() -> str:
    """The package that holds nvCOMP for the CUDA that torch is built for."""
    return f"nvidia-libnvcomp-cu{(torch.version.cuda or '13').partition('.')[0]}"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """nvCOMP's library. Raises NoCodec where it is missing, or of another major version."""
    install = f'pip install "{package()}>={MAJOR},<{MAJOR + 1}"'
    try:
        found = importlib.import_module("nvidia.libnvcomp").load_library()
    except (ImportError, OSError) as error:
        raise NoCodec(f"lossless coding on the GPU needs nvCOMP, which is not installed ({error}): {install}") from None
    if found is None:
        raise NoCodec(f"nvCOMP is installed, but its library could not be loaded; install it again: {install}")
    properties = _Properties()
    if found.nvcompGetProperties(ctypes.byref(properties)) != 0 or properties.version // 1000 != MAJOR:
        version = f"{properties.version // 1000}.{properties.version // 100 % 10}"
        raise NoCodec(f"nvCOMP {version} is installed, which codes otherwise than nvCOMP {MAJOR}: {install}")
    a, s = _ADDRESS, _SIZE
    found.nvcompBatchedANSCompressGetMaxOutputChunkSize.argtypes = [s, _CompressOptions, a]
    found.nvcompBatchedANSCompressGetTempSize.argtypes = [s, s, _CompressOptions, a, s, a]
    found.nvcompBatchedANSCompressAsync.argtypes = [a, a, s, s, a, s, a, a, _CompressOptions, a, a]
    found.nvcompBatchedANSDecompressGetTempSize.argtypes = [s, s, _DecompressOptions, a, s, a]
    found.nvcompBatchedANSDecompressAsync.argtypes = [a, a, a, a, s, a, s, a, _DecompressOptions, a, a]
    return found


def is_installed() -> bool:
    """Whether nvCOMP can be used here."""
    try:
        library()
    except NoCodec as reason:
        log.debug("weights will not be encoded: %s", reason)
        return False
    return True


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"nvCOMP could not {what}: its status is {status} (nvcomp/shared_types.h says what that is)")


def _size(function: object, *arguments: object) -> int:
    """What one of nvCOMP's functions writes to the last pointer among ``arguments``, which is None there."""
    size = _SIZE()
    place = [ctypes.byref(size) if argument is None else argument for argument in arguments]
    _check(function(*place), "say how much memory it needs")
    return size.value


def _scratch_bytes(lib: ctypes.CDLL, count: int, chunk: int, total: int, device: torch.device) -> int:
    """Bytes that decoding up to so many chunks takes beside its source and target; nvCOMP 6.0 needs none."""
    stream = torch.cuda.current_stream(device).cuda_stream
    return _size(lib.nvcompBatchedANSDecompressGetTempSize, count, chunk, _DECODING, None, total, stream)


def _uint8(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class NvcompCodec:
    """See ``Codec``. Raises NoCodec where nvCOMP is missing."""

    name = NAME

    def __init__(self, device: torch.device) -> None:
        self.library = library()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._streams = threading.local()

    def stream(self) -> torch.cuda.Stream:
        """The stream on which the calling thread encodes."""
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)
        return self._streams.own

    def _bounce(self) -> torch.Tensor:
        """PIECE bytes of page-locked memory of the calling thread's own. Copies of other memory are slow, and the driver
        makes one of them at a time."""
        if not hasattr(self._streams, "bounce"):
            self._streams.bounce = HostSegment(PIECE)
            self._streams.bounce.page_lock(registrar_for(self.device))
        return self._streams.bounce.buffer

    def _page_locked(self, source: torch.Tensor) -> torch.Tensor:
        """Up to PIECE bytes, in page-locked memory where they are many in host memory. What was there before has been read."""
        if source.is_cuda or len(source) < FEW:
            return source
        bounce = self._bounce()[: len(source)]
        ctypes.memmove(bounce.data_ptr(), source.data_ptr(), len(source))
        return bounce

    def encode(self, source: torch.Tensor, kind: str, target: torch.Tensor, chunk: int = CHUNK) -> Chunks | None:
        nbytes = len(source)
        count = count_of(nbytes, chunk)
        sizes = numpy.zeros(count, numpy.int64)
        at, done = table_bytes(count), 0
        stream = self.stream()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(stream):
            piece = _Piece(self, min(PIECE // chunk, count), chunk, kind) if count else None
            step = PIECE // chunk * chunk
            for begin in range(0, nbytes, step):
                rows, lengths = piece.encode(self._page_locked(source[begin : begin + step]))
                if at + int((-(-lengths // ALIGNMENT) * ALIGNMENT).sum()) > len(target):
                    stream.synchronize()
                    return None
                # joined on the device: a copy a chunk from Python is what eight threads would wait for
                joined = torch.cat(
                    [row[: padded(size)] for row, size in zip(rows.unbind(), lengths.tolist(), strict=True)]
                )
                target[at : at + len(joined)].copy_(joined, non_blocking=True)
                at += len(joined)
                sizes[done : done + len(lengths)] = lengths
                done += len(lengths)
            stream.synchronize()
        chunks = Chunks(nbytes, chunk, sizes)
        chunks.write_table(target)
        return chunks

    def decode(self, encoded: torch.Tensor, chunks: Chunks, target: torch.Tensor, name: str = "a tensor") -> None:
        step, places = PIECE // chunks.chunk, _places((0, 0, chunks))
        with torch.inference_mode(), torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            for first in range(0, chunks.count, step):
                sizes = chunks.sizes[first : first + step]
                last = first + len(sizes) - 1
                begin, end = int(chunks.offsets[first]), int(chunks.offsets[last] + chunks.sizes[last])
                start, stop = first * chunks.chunk, min(chunks.nbytes, (last + 1) * chunks.chunk)
                source = encoded[begin:end].to(self.device)
                out = target[start:stop] if target.is_cuda else _uint8(stop - start, self.device)
                (part,) = self._upload([places[:, first : last + 1] - [[begin], [0], [start], [0]]])
                part.decode(source, out, None, stream)
                damaged = part.damaged()
                if damaged is not None:
                    raise Corrupt(f"{name}: chunk {first + damaged} of {chunks.count} is damaged")
                if not target.is_cuda:
                    bounce = self._bounce()[: stop - start].copy_(out)
                    ctypes.memmove(target.data_ptr() + start, bounce.data_ptr(), stop - start)

    def batches(self, units: Sequence[Sequence[Part]]) -> list[NvcompBatch]:
        none = numpy.zeros((4, 0), numpy.int64)
        return self._upload([numpy.concatenate([none, *map(_places, parts)], axis=1) for parts in units])

    def _upload(self, places: Sequence[numpy.ndarray]) -> list[NvcompBatch]:
        """A batch for each of ``places``, see ``_places``: by one copy for all of them, because each is waited for."""
        counts = [part.shape[1] for part in places]
        there = torch.from_numpy(numpy.concatenate(places, axis=1)).to(self.device)
        found = torch.zeros(sum(counts), dtype=torch.int64, device=self.device)
        statuses = torch.zeros(sum(counts), dtype=torch.int32, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()  # another stream reads what was written here
        largest = max((int(part[3].max(initial=0)) for part in places), default=0)
        total = max((int(part[3].sum()) for part in places), default=0)
        scratch = _scratch_bytes(self.library, max(counts), largest, total, self.device) if sum(counts) else 0
        rows = zip(there.split(counts, dim=1), found.split(counts), statuses.split(counts), strict=True)
        return [NvcompBatch(self, *tensors, scratch) for tensors in rows]


def _places(part: Part) -> numpy.ndarray:
    """int64 [4, count]: where each chunk lies in the buffer of encoded ones, its encoded size, where it goes in the buffer of plain
    ones, its plain size."""
    at, to, chunks = part
    return numpy.stack((at + chunks.offsets, chunks.sizes, to + chunks.plain_offsets, chunks.plain_sizes))


class _Piece:
    """Device memory for encoding up to ``count`` chunks of ``chunk`` bytes at once, on the present stream."""

    def __init__(self, codec: NvcompCodec, count: int, chunk: int, kind: str) -> None:
        lib, device = codec.library, codec.device
        self._library, self._chunk, self._device = lib, chunk, device
        self._options = _CompressOptions(data_type=TYPES[kind])
        row = padded(_size(lib.nvcompBatchedANSCompressGetMaxOutputChunkSize, chunk, self._options, None))
        stream = torch.cuda.current_stream(device).cuda_stream
        room = _size(lib.nvcompBatchedANSCompressGetTempSize, count, chunk, self._options, None, count * chunk, stream)
        back = _scratch_bytes(lib, count, chunk, count * chunk, device)
        self._temp, self._temp_back = _uint8(room, device), _uint8(back, device)
        self._plain, self._again = _uint8(count * chunk, device), _uint8(count * chunk, device)
        self._rows = _uint8(count * row, device).view(count, row)
        numbers = torch.arange(count, device=device)
        self._from = numbers * chunk + self._plain.data_ptr()
        self._back = numbers * chunk + self._again.data_ptr()
        self._to = numbers * row + self._rows.data_ptr()
        self._statuses = torch.zeros(count, dtype=torch.int32, device=device)
        self._result = torch.zeros(count + 1, dtype=torch.int64, device=device)

    def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, numpy.ndarray]:
        """The encoded chunks of ``source``, one a row of uint8 [count, room], and their sizes, int64 [count]. Waits."""
        nbytes, lib = len(source), self._library
        count = count_of(nbytes, self._chunk)
        plain, again = self._plain[:nbytes], self._again[:nbytes]
        plain.copy_(source, non_blocking=True)
        lengths = torch.full((count,), self._chunk, device=self._device)
        lengths[-1] = nbytes - (count - 1) * self._chunk
        sizes, stream = self._result[:count], torch.cuda.current_stream(self._device).cuda_stream
        status = lib.nvcompBatchedANSCompressAsync(
            self._from.data_ptr(),
            lengths.data_ptr(),
            self._chunk,
            count,
            self._temp.data_ptr(),
            len(self._temp),
            self._to.data_ptr(),
            sizes.data_ptr(),
            self._options,
            self._statuses.data_ptr(),
            stream,
        )
        _check(status, "encode weights")
        failed = self._statuses[:count].any()
        found = torch.empty_like(lengths)
        _decompress(lib, self._to, sizes, lengths, self._back, found, self._statuses, count, self._temp_back, stream)
        words = torch.int64 if nbytes % 8 == 0 else torch.uint8
        wrong = self._statuses[:count].any() | failed | (plain.view(words) != again.view(words)).any()
        self._result[-1] = wrong
        result = self._result.cpu().numpy()
        if result[-1]:
            raise RuntimeError("nvCOMP did not decode what it had just encoded; lossless coding cannot be used here")
        return self._rows[:count], result[:count].copy()


def _decompress(
    lib: ctypes.CDLL,
    encoded: torch.Tensor,
    sizes: torch.Tensor,
    lengths: torch.Tensor,
    plain: torch.Tensor,
    found: torch.Tensor,
    statuses: torch.Tensor,
    count: int,
    scratch: torch.Tensor,
    stream: int,
) -> None:
    """Queue the decoding of ``count`` chunks. All are tensors of the device: ``encoded`` and ``plain`` addresses, ``sizes``
    encoded bytes, ``lengths`` the room for plain ones, ``found`` (int64) and ``statuses`` (int32) are written."""
    status = lib.nvcompBatchedANSDecompressAsync(
        encoded.data_ptr(),
        sizes.data_ptr(),
        lengths.data_ptr(),
        found.data_ptr(),
        count,
        scratch.data_ptr(),
        len(scratch),
        plain.data_ptr(),
        _DECODING,
        statuses.data_ptr(),
        stream,
    )
    _check(status, "decode weights")


class NvcompBatch:
    """See ``Batch``. On the device: ``places`` as ``_places`` says, and room for what decoding finds, ``found`` int64 [count] and
    ``statuses`` int32 [count]. It takes ``scratch`` bytes."""

    def __init__(
        self, codec: NvcompCodec, places: torch.Tensor, found: torch.Tensor, statuses: torch.Tensor, scratch: int
    ) -> None:
        self._library, self._device, self.count = codec.library, codec.device, len(statuses)
        self._offsets, self._sizes, self._plain_offsets, self._lengths = places
        self._found, self._statuses = found, statuses
        self._temp = _uint8(scratch, codec.device)
        self._addresses: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def decode(self, encoded: torch.Tensor, target: torch.Tensor, key: object, stream: torch.cuda.Stream) -> None:
        if not self.count:
            return
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self.decode(encoded, target, key, stream)
        addresses = self._addresses.get(key) if key is not None else None
        if addresses is None:
            with torch.cuda.stream(stream):
                addresses = (self._offsets + encoded.data_ptr(), self._plain_offsets + target.data_ptr())
            if key is not None:
                self._addresses[key] = addresses
        _decompress(
            self._library,
            addresses[0],
            self._sizes,
            self._lengths,
            addresses[1],
            self._found,
            self._statuses,
            self.count,
            self._temp,
            stream.cuda_stream,
        )

    def damaged(self) -> int | None:
        """The first chunk that could not be decoded the last time; waits for the present stream."""
        wrong = ((self._statuses != 0) | (self._found != self._lengths)).nonzero()
        return int(wrong[0]) if len(wrong) else None

    def forget(self) -> None:
        self._addresses.clear()
