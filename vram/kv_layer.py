"""Key/value caches that are allocated once: appending writes into place, and reading is a view.

Built by concatenation, a cache is a new tensor after every step: each step copies everything that is there, and what
comes out is often not contiguous, which NCCL cannot send. Here ``KVCache`` is the keys (or values) of one layer over a
piece of one buffer; ``kv_cache.py`` has the cache for all layers. It has the interface of Medusa's and EAGLE's class of
that name, so that it can stand in its place: ``cat``, ``copy``, ``current_length``, ``shape``.

>>> cache = KVCache(torch.zeros(1, 8, 2200, 128))
>>> keys = cache.cat(torch.randn(1, 8, 4, 128))  # a view of the four rows in the buffer
"""

from __future__ import annotations

import torch

from .kv_layouts import FP8, as_bytes, decode, encode, length_dim, move_left, piece_is_contiguous
from .kv_rolling import CacheFull, Place, place

WHEN_FULL = ("error", "grow", "roll")


class KVCache:
    """Keys or values of one layer, in ``data`` [batch, heads, max_length, head_dim] or another ``layout``.

    The length, and what it means for the host:
    - an int (default): counted on the host, nothing is ever read back from the device;
    - a 0-dimensional int64 tensor on the CPU, as Medusa has it: whoever holds it may set it (``zero_()`` resets);
    - with ``device_length`` (default for a length tensor on a GPU), a tensor beside the data, read and advanced by
      kernels only. Nothing depends on the host then, so that one CUDA graph, or one graph of ``torch.compile``, serves
      all lengths: addresses are fixed, ``get_data`` returns the whole buffer, and ``mask`` says which rows are valid.
      Rows past the end cannot raise there: they never leave the buffer, spoil its last row, and ``check`` raises.

    ``when_full``: "error"; "grow" doubles the buffer (``data`` is then another tensor); "roll" lets the oldest rows behind
    the first ``sink`` ones leave. Rows are stored as FP8 where ``scales`` (float32, ``data``'s shape with head_dim 1) is
    given with e4m3 ``data``; ``scratch``, of the dtype to return and ``data``'s shape, is what ``get_data`` decodes into.

    Raises ValueError for a negative length or one past the end, and for options that exclude each other.
    """

    def __init__(
        self,
        data: torch.Tensor,
        current_length: int | torch.Tensor = 0,
        *,
        layout: str = "bhld",
        when_full: str = "error",
        sink: int = 0,
        device_length: bool | None = None,
        scales: torch.Tensor | None = None,
        scratch: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        self.data, self.scales, self.scratch = data, scales, scratch
        self.layout, self.dim, self.when_full, self.sink = layout, length_dim(layout), when_full, sink
        self.dtype = data.dtype if scratch is None else scratch.dtype
        self._device, self._size = data.device, data.shape[self.dim] if data.dim() == 4 else 0
        self._before, self._after = data.shape[: self.dim], data.shape[self.dim + 1 :]
        self._evicted = 0
        if device_length is None:
            device_length = isinstance(current_length, torch.Tensor) and current_length.device.type != "cpu"
        self.device_length = device_length
        self._refuse(current_length)
        if device_length:
            if not isinstance(current_length, torch.Tensor):
                current_length = torch.full((), current_length, dtype=torch.int64, device=data.device)
            if positions is None:
                positions = torch.arange(self.max_length, device=data.device)
            self._positions = positions
            for tensor in (data, scales, scratch, current_length, positions):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        # a list with a place in it, so that the caches of a model can share one and be advanced together
        self._lengths: list[int] | None = [current_length] if isinstance(current_length, int) else None
        self._at = 0
        self._length = None if self._lengths else current_length
        self._simple = scales is None and when_full != "roll" and self._lengths is not None

    def _refuse(self, length: int | torch.Tensor) -> None:
        """Options that cannot be."""
        if self.data.dim() != 4:
            raise ValueError(f"a cache has four dimensions ({self.layout}); this one is {list(self.data.shape)}")
        if self.when_full not in WHEN_FULL:
            raise ValueError(f"when_full {self.when_full!r} is none of {', '.join(WHEN_FULL)}")
        if not 0 <= self.sink < self.max_length or (self.sink and self.when_full != "roll"):
            raise ValueError(f"sink {self.sink}: rows that stay while a cache of {self.max_length} rolls")
        if (self.scales is None) != (self.data.dtype != FP8) or (self.scales is None) != (self.scratch is None):
            raise ValueError(f"{FP8} codes need scales and a scratch, other dtypes neither")
        if self.device_length and self.when_full != "error":
            raise ValueError(
                f"a length on the device keeps addresses fixed and knows no branches: no {self.when_full!r}"
            )
        if self.when_full == "grow" and self.scales is not None:
            raise ValueError("an FP8 cache does not grow: its scratch is shared")
        if isinstance(length, torch.Tensor):
            if length.dim() or length.dtype != torch.int64:
                raise ValueError(
                    f"a length is an int64 tensor without dimensions, not {list(length.shape)} {length.dtype}"
                )
            if self.device_length and length.device != self.data.device:
                raise ValueError(f"the length is on {length.device}, the data on {self.data.device}")
            if not self.device_length and (length.device.type != "cpu" or self.when_full == "roll"):
                raise ValueError("a rolling cache counts on the host: give its length as an int")
        readable = isinstance(length, int) or length.device.type == "cpu"
        if readable and not 0 <= int(length) <= self.max_length:
            raise ValueError(f"a length of {int(length)} in a cache of max_length {self.max_length}")

    def share_lengths(self, lengths: list[int], at: int) -> None:
        """Count the length in ``lengths[at]`` from now on, which caches of other layers share."""
        lengths[at] = self._host_length()
        self._lengths, self._at, self._length = lengths, at, None
        self._simple = self.scales is None and self.when_full != "roll"

    @property
    def max_length(self) -> int:
        """Rows that the buffer holds."""
        return self._size

    @property
    def current_length(self) -> int | torch.Tensor:
        """Valid rows: an int, or the length tensor itself where the cache was given one. Never synchronises."""
        return self._length if self._lengths is None else self._lengths[self._at]

    @property
    def total_length(self) -> int | torch.Tensor:
        """Rows up to the last one written, with those that left a rolling window: where the next append begins."""
        return self.current_length if not self._evicted else self._host_length() + self._evicted

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the valid part; reads the length, which synchronises where that is on a GPU."""
        return (*self._before, int(self.current_length), *self._after)

    @property
    def prefix_is_contiguous(self) -> bool:
        """Whether the valid part, and any piece of the length, is contiguous: see ``kv_layouts``."""
        return piece_is_contiguous(self.data, self.dim)

    def check_rows(self, tensor: torch.Tensor) -> int:
        """The number of rows in ``tensor``; ValueError unless its other sizes, dtype and device are the cache's."""
        shape = tensor.shape
        if (
            len(shape) != 4
            or shape[: self.dim] != self._before
            or shape[self.dim + 1 :] != self._after
            or tensor.dtype != self.dtype
            or tensor.device != self._device
        ):
            holds = "[" + ", ".join([*map(str, self._before), "any", *map(str, self._after)]) + "]"
            raise ValueError(
                f"a cache of {holds} ({self.layout}) {self.dtype} on {self._device} "
                f"was given {list(shape)} {tensor.dtype} on {tensor.device}"
            )
        return shape[self.dim]

    def append(self, tensor: torch.Tensor) -> None:
        """Write rows behind the last one. No allocation, and no copy of what is there.

        ``tensor``: the cache's shape, dtype and device with any number of rows, else ValueError. CacheFull: no room.
        """
        self.put(tensor, self.check_rows(tensor), None)

    def write(self, tensor: torch.Tensor, start: int | torch.Tensor) -> None:
        """Write rows at the absolute row ``start``: what lies there is replaced, and only rows past the end add length.

        ValueError for a negative start or one that leaves a gap; CacheFull if there is no room. With the length on the
        device, ``start`` may be a tensor there, which is not checked; nor is a gap.
        """
        self.put(tensor, self.check_rows(tensor), start)

    def place(self, tensor: torch.Tensor, at: int) -> None:
        """Copy rows to row ``at`` of the buffer and leave the length as it is: ``set_length`` says when they count."""
        rows = self.check_rows(tensor)
        if at < 0 or at + rows > self._size:
            raise CacheFull(f"{rows} rows at {at} do not fit into a cache of max_length {self._size}")
        self._copy_to(tensor, at, rows)

    def put(self, tensor: torch.Tensor, rows: int, start: int | torch.Tensor | None) -> None:
        """``write`` of rows that were checked and counted before; ``start`` None: behind the last row."""
        if self.device_length:
            self._write_on_device(tensor, self._length if start is None else start, rows)
            return
        if start is None and self._simple:
            at = self._lengths[self._at]
            stop = at + rows
            if stop <= self._size:  # most appends: nothing moves, nothing is encoded
                self.data.narrow(self.dim, at, rows).copy_(tensor.detach(), non_blocking=True)
                self._lengths[self._at] = stop
                return
        spot = self.room(rows, start)
        self._make_room(spot)
        self._copy_to(tensor, spot.at, rows)
        self._set(spot.length)

    def cat(self, tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
        """``append``, then ``get_data``. ``dim``, where given, must be the length's: ValueError."""
        if dim is not None and dim % 4 != self.dim:
            raise ValueError(f"a cache in layout {self.layout} grows along dimension {self.dim}, not {dim}")
        self.append(tensor)
        return self.get_data()

    def get_data(self, last: int | None = None) -> torch.Tensor:
        """The valid rows, or the ``last`` ones of them: a view, contiguous where ``prefix_is_contiguous``.

        From an FP8 cache: decoded into the scratch, which all layers share, so it holds until the next ``get_data``.
        With the length on the device: the whole buffer, to be read with ``mask``.
        """
        codes, scales = self.get_stored(last)
        if scales is None:
            return codes
        return decode(codes, scales, self.scratch.narrow(self.dim, 0, codes.shape[self.dim]))

    def get_stored(self, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``get_data`` as it is stored: (e4m3 codes, float32 scales), or (rows, None). Views."""
        if self.device_length:
            if last is not None:
                raise ValueError("the last rows of a cache whose length is on the device: use its mask")
            return self.data, self.scales
        length = self._host_length()
        if last is not None and last < 0:
            raise ValueError(f"the last {last} rows: lengths are not negative")
        count = length if last is None else min(last, length)
        scales = None if self.scales is None else self.scales.narrow(self.dim, length - count, count)
        return self.data.narrow(self.dim, length - count, count), scales

    def mask(self) -> torch.Tensor:
        """Which rows of the buffer are valid: bool [max_length]. Only with the length on the device."""
        return self._positions < self._length

    def check(self) -> None:
        """Raise CacheFull if rows were written past the end while the length was on the device. Synchronises."""
        if int(self.current_length) > self.max_length:
            raise CacheFull(
                f"{int(self.current_length)} rows were written into a cache of max_length {self.max_length}"
            )

    def reset(self) -> None:
        """Empty the cache; the buffer stays."""
        self._evicted = 0
        self._set(0)

    def set_length(self, length: int) -> None:
        """Say how many rows are valid, for code that wrote into ``data`` itself. ValueError outside 0 to max_length."""
        if not 0 <= length <= self.max_length:
            raise ValueError(f"a length of {length} in a cache of max_length {self.max_length}")
        self._set(length)

    def copy(self, indices: torch.Tensor, prev_length: int, dim: int | None = None) -> None:
        """Keep the rows ``indices`` (one dimension, integer), moved to ``prev_length``, and end there: what speculative
        decoding does with the accepted ones. Indices on the CPU are checked, those on a device are not."""
        if dim is not None and dim % 4 != self.dim:
            raise ValueError(f"the length of layout {self.layout} is dimension {self.dim}, not {dim}")
        if prev_length < 0 or (not self.device_length and prev_length > self._host_length()):
            raise ValueError(f"rows cannot be moved to {prev_length}: the cache's length is {self.current_length}")
        rows = indices.shape[0]
        if prev_length + rows > self.max_length:
            raise CacheFull(f"{rows} rows at {prev_length} do not fit into a cache of max_length {self.max_length}")
        for data in self._stored_parts():
            picked = data.index_select(self.dim, indices.to(data.device))
            data.narrow(self.dim, prev_length, rows).copy_(picked)
        self._set(prev_length + rows)

    def room(self, rows: int, start: int | None = None) -> Place:
        """Where ``write`` would put ``rows`` rows: nothing is changed, and what it would raise is raised."""
        length = self._host_length()
        size = None if self.when_full == "grow" else self.max_length
        sink = self.sink if self.when_full == "roll" else None
        return place(length + self._evicted if start is None else int(start), rows, length, self._evicted, size, sink)

    def _host_length(self) -> int:
        return int(self._length) if self._lengths is None else self._lengths[self._at]

    def _set(self, length: int) -> None:
        if self._lengths is None:
            self._length.fill_(length)
        else:
            self._lengths[self._at] = length

    def _stored_parts(self) -> list[torch.Tensor]:
        return [as_bytes(self.data)] if self.scales is None else [as_bytes(self.data), self.scales]

    def _encoded(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor`` as it is stored, in the order of ``_stored_parts``."""
        if self.scales is None:
            return [tensor.detach()]
        codes, scales = encode(tensor.detach())
        return [as_bytes(codes), scales]

    def _copy_to(self, tensor: torch.Tensor, at: int, rows: int) -> None:
        for data, part in zip(self._stored_parts(), self._encoded(tensor), strict=True):
            data.narrow(self.dim, at, rows).copy_(part, non_blocking=True)

    def _write_on_device(self, tensor: torch.Tensor, start: int | torch.Tensor, rows: int) -> None:
        first = start if isinstance(start, int) else 0
        if first < 0:
            raise ValueError(f"rows cannot be written at {start}: lengths are not negative")
        if first + rows > self._size:
            raise CacheFull(f"{rows} rows at {first} do not fit into a cache of max_length {self._size}")
        where = torch.clamp(self._positions[:rows] + start, 0, self.max_length - 1)
        for data, part in zip(self._stored_parts(), self._encoded(tensor), strict=True):
            data.index_copy_(self.dim, where, part)
        if start is self._length:
            self._length.add_(rows)
        elif isinstance(start, torch.Tensor):
            self._length.copy_(torch.maximum(self._length, start + rows))
        else:
            self._length.clamp_(min=start + rows)

    def _make_room(self, spot: Place) -> None:
        if spot.evicted:
            for data in self._stored_parts():
                move_left(data, self.dim, spot.source, spot.target, spot.moved)
            self._evicted += spot.evicted
        elif spot.length > self.max_length:
            size = self._size
            while size < spot.length:
                size *= 2
            valid = self.get_data()
            with torch.inference_mode(False):
                grown = self.data.new_zeros((*self._before, size, *self._after))
            grown.narrow(self.dim, 0, valid.shape[self.dim]).copy_(valid)
            self.data, self._size = grown, size
