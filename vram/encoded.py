"""A weight that is kept encoded: a tensor of the plain one's shape and dtype whose memory is the encoded bytes.

Any operation on it decodes it first, so that whoever reads it gets the right values, at the price of decoding them each time.
The engine decodes it into a slot instead. It cannot be written to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_map

from .codec import Chunks, Corrupt, codec_named, read_chunks
from .host_memory import new_memory
from .units import KIB

_KEPT = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def checksum_of(encoded: torch.Tensor) -> int:
    """Of uint8 [n] in host memory: CRC-32 of the sums (modulo 2**64) of the little-endian 64-bit words of each KiB, and of the
    bytes behind the last KiB. It finds damage as a CRC of all bytes would, except words that changed places within a KiB, at
    the speed of memory, so that copies do not wait for it."""
    data = encoded.numpy()
    whole = len(data) - len(data) % KIB
    words = data[:whole].view("<u8")
    # twice as fast as sum(axis=1); with ``out`` it would hold Python's lock
    sums = numpy.add.reduceat(words, numpy.arange(0, len(words), KIB // 8))
    return zlib.crc32(data[whole:], zlib.crc32(sums))


class EncodedTensor(torch.Tensor):
    """``encoded``: uint8 [n], the table and the chunks (codec.py) of a dense tensor of ``dtype``, ``shape`` and ``stride``,
    which the codec called ``codec`` made in chunks of ``chunk`` bytes. ``name`` is for messages. ``checksum``: ``checksum_of``
    ``encoded``, where that comes from a file; it is looked at once, before anything is decoded.
    """

    encoded: torch.Tensor
    ATTRIBUTES = ("encoded", "codec", "chunk", "path", "checksum", "_own", "_chunks")

    @staticmethod
    def __new__(
        cls,
        encoded: torch.Tensor,
        dtype: torch.dtype,
        shape: Sequence[int],
        stride: Sequence[int],
        codec: str,
        chunk: int,
        name: str,
        checksum: int | None = None,
    ) -> EncodedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=tuple(stride), dtype=dtype, device=encoded.device, requires_grad=False
        )

    def __init__(
        self,
        encoded: torch.Tensor,
        dtype: torch.dtype,
        shape: Sequence[int],
        stride: Sequence[int],
        codec: str,
        chunk: int,
        name: str,
        checksum: int | None = None,
    ) -> None:
        self.encoded, self.codec, self.chunk, self.path, self.checksum = encoded, codec, chunk, name, checksum
        self._own = self.untyped_storage()  # kept, so that its address is no other's
        self._chunks: Chunks | None = None

    def verify(self) -> None:
        """Raises Corrupt where the bytes are not those that were written to the file. Several threads may ask at once."""
        wanted = self.checksum
        if wanted is not None:
            data = self._written().cpu()
            found = checksum_of(data)
            if found != wanted:
                self._chunks = None  # the file may be mended, where this is not a copy
                raise Corrupt(
                    f"{self.path} is damaged: the checksum of its encoded bytes is {found:08x}, not {wanted:08x}. "
                    "Download or copy the file again, and load the model again"
                )
            self._chunks = self._read_chunks(data)  # a file that was mended since had another table
            self.checksum = None

    def _written(self) -> torch.Tensor:
        """The bytes that were written to the file: where the memory is a packed copy's, there is more behind them."""
        try:
            return self.encoded[: self.chunks().encoded]
        except Corrupt:  # the checksum says so in words that help
            return self.encoded

    def chunks(self) -> Chunks:
        """Where its chunks lie; its table is read once. Raises Corrupt."""
        chunks = self._chunks
        if chunks is None:
            chunks = self._chunks = self._read_chunks(self.encoded.cpu())
        return chunks

    def read_again(self, copied: torch.Tensor) -> None:
        """Its bytes were ``copied``: what counts is the table there. Raises Corrupt."""
        self._chunks = None  # of a table that cannot be, the file's is read again
        self._chunks = self._read_chunks(copied)

    def _read_chunks(self, data: torch.Tensor) -> Chunks:
        return read_chunks(data, self.numel() * self.element_size(), self.chunk, self.path)

    @property
    def replaced(self) -> torch.Tensor | None:
        """The plain tensor that somebody gave this one instead of its encoded bytes, by setting ``data``: moving a module
        does that. None while it is what it was made of."""
        storage = self.untyped_storage()
        if storage._cdata == self._own._cdata:
            return None
        try:
            if not storage.data_ptr():
                return None
        except RuntimeError:  # torch says so of a storage that is none
            return None
        with torch.inference_mode(self.is_inference()):
            plain = torch.empty(0, dtype=self.dtype, device=self.device)
            return plain.set_(storage, self.storage_offset(), self.shape, self.stride())

    def decode(self, device: torch.device | None = None) -> torch.Tensor:
        """The plain tensor, on ``device`` or where the encoded bytes are. Raises Corrupt, NoCodec."""
        plain = self.replaced
        if plain is not None:
            return plain if device is None else plain.to(device)
        nbytes, device = self.numel() * self.element_size(), device or self.encoded.device
        target = new_memory(nbytes) if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.verify()
        codec_named(self.codec).decode(self.encoded, self.chunks(), target, self.path)
        return target.view(self.dtype).as_strided(self.shape, self.stride())

    def over(self, encoded: torch.Tensor) -> EncodedTensor:
        """The same with its bytes elsewhere."""
        return EncodedTensor(
            encoded, self.dtype, self.shape, self.stride(), self.codec, self.chunk, self.path, self.checksum
        )

    def detach(self) -> torch.Tensor:
        """As torch's. Without its dispatch, which at the first call on a subclass imports ``torch.distributed.tensor`` and
        with it sympy: 0.7 to 3 s of every process that makes a Parameter of a weight (torch 2.11 to 2.13)."""
        return self.over(self.encoded) if self.replaced is None else super().detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        plain = self.replaced
        copied = plain.clone() if plain is not None else self.over(self.encoded.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickled, and saved by ``torch.save``, as the plain tensor, which any PyTorch loads."""
        plain = self.decode()
        if isinstance(self, nn.Parameter):
            plain = nn.Parameter(plain, requires_grad=False)
        return plain.__reduce_ex__(protocol)

    def storage(self) -> Any:
        """What the safetensors library asks for before it writes. Raises RuntimeError where there is nothing plain to write."""
        if self.replaced is None:
            raise RuntimeError(
                f"{self.path} is kept encoded, and cannot be written to a file as it is. Save the model behind a Block Swap "
                "node, which decodes it, or decode its file: intelligent-vram compress FILE OTHER --decompress"
            )
        return super().storage()

    def __repr__(self, **_: Any) -> str:
        return f"EncodedTensor({tuple(self.shape)}, {self.dtype}, {len(self.encoded)} bytes of {self.codec})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEPT and args[0].replaced is None:
            return args[0].over(args[0].encoded)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, EncodedTensor) and value.replaced is None:
                raise RuntimeError(
                    f"{value.path} is kept encoded and cannot be changed in place; decode it and replace it"
                )

        def plain(value: Any) -> Any:
            return value.decode() if isinstance(value, EncodedTensor) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def is_encoded(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor, itself and not a part of it, holds encoded bytes."""
    return isinstance(tensor, EncodedTensor) and tensor.replaced is None
