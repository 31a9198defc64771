"""How much a change of precision costs: errors of tensors, collected layer by layer, told as a table, warnings and a
picture (accuracy_picture.py).

>>> accuracy = Accuracy()
>>> accuracy.compare("blocks.0.ffn.0", weight, restored, "float8_e4m3fn")
>>> print("\\n".join([*accuracy.table(), *accuracy.warnings()]))
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, isnan, log10, nan, prod, sqrt
from typing import TYPE_CHECKING, Any

import torch

from ..vram.discover import BLOCK_LISTS
from .formats import FORMATS, Format
from .quantize import dequantize

if TYPE_CHECKING:
    from PIL.Image import Image

SLICE = 1 << 20  # elements that are compared at once: three float64 copies of them are 24 MiB
ROWS_SLICE = 1 << 22  # weights that are dequantized at once
WORST = 10  # layers that the table names

# A layer suffers where its error is above all of the first three, or above the last.
TIMES_MEDIAN, DEVIATIONS, NEGLIGIBLE, LOST = 2.0, 6.0, 1e-3, 0.25
MAD_TO_SIGMA = 1.4826  # of a normal distribution
RULE = (
    f"A layer suffers if its relative error is more than {TIMES_MEDIAN:g} times the median of its format, more than "
    f"{DEVIATIONS:g} robust standard deviations ({MAD_TO_SIGMA} times the median absolute deviation) above it and more than "
    f"{NEGLIGIBLE:.1%}; or more than {LOST:.0%}; or no number."
)

_BLOCK = re.compile(rf"^(?P<list>(?:.*?\.)??(?:{'|'.join(BLOCK_LISTS)}))\.(?P<block>\d+)\.(?P<kind>.+)$")
_PREFIX = re.compile(r"^(?:model\.)?diffusion_model\.")


@dataclass(frozen=True)
class Error:
    """How far a result is from its reference.

    relative: ||result - reference|| / ||reference||; 0 for equal zeros, inf where only the reference is zero.
    cosine: of the angle between both; 1 for equal zeros, 0 where only one is zero.
    worst: largest absolute difference. All are NaN where either holds NaN or Inf.
    """

    relative: float
    cosine: float
    worst: float

    @property
    def snr_db(self) -> float:
        """Signal to noise in decibels: -20 log10(relative); inf for equal tensors."""
        if self.relative == 0:
            return inf
        return -inf if self.relative == inf else -20 * log10(self.relative)

    def describe(self) -> str:
        """All figures in a line."""
        if self.relative == 0:
            return "equal to the bit"
        if isnan(self.relative):
            return "not a number: one of both holds NaN or Inf"
        return (
            f"relative error {percent(self.relative)} ({decibels(self.snr_db)}), cosine {self.cosine:.7g}, largest "
            f"difference {self.worst:.3g}"
        )


class ErrorSum:
    """The error of something that comes in parts. Sums are kept in float64 on the parts' device; nothing waits for it
    before ``error``."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # of squared differences, of squares of both, of products
        self._worst: torch.Tensor | None = None

    def add(self, result: torch.Tensor, reference: torch.Tensor) -> None:
        """One part: two tensors of the same shape, of any real dtypes, both on one device. Raises ValueError."""
        if result.shape != reference.shape:
            raise ValueError(f"cannot compare a tensor of shape {[*result.shape]} with one of {[*reference.shape]}")
        for part, expected in zip(
            result.detach().reshape(-1).split(SLICE), reference.detach().reshape(-1).split(SLICE), strict=True
        ):
            if not part.numel():
                continue
            if part.device.type == "mps":  # has no float64
                part, expected = part.cpu(), expected.cpu()
            a, b = part.to(torch.float64), expected.to(torch.float64)
            difference = a - b
            sums = torch.stack([difference @ difference, a @ a, b @ b, a @ b])
            worst = difference.abs().amax()
            self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
            self._worst = worst if self._worst is None else torch.maximum(self._worst, worst.to(self._worst.device))

    def error(self) -> Error:
        """The error of all parts so far."""
        if self._sums is None or self._worst is None:
            return Error(0.0, 1.0, 0.0)
        (noise, left, right, product), worst = self._sums.tolist(), self._worst.item()
        if not all(map(isfinite, (noise, left, right, product))):
            return Error(nan, nan, nan)
        if noise == 0:
            return Error(0.0, 1.0, 0.0)
        relative = sqrt(noise) / sqrt(right) if right else inf
        cosine = max(-1.0, min(1.0, product / (sqrt(left) * sqrt(right)))) if left and right else 0.0
        return Error(relative, cosine, worst)


def error(result: torch.Tensor, reference: torch.Tensor) -> Error:
    """The error of ``result`` against ``reference``: the same shape, any real dtype, any strides, on any devices.

    Computed on the device of ``reference`` in float64, in slices of 24 MiB; what is not contiguous is copied first.
    Raises ValueError for different shapes.
    """
    found = ErrorSum()
    found.add(result.to(reference.device), reference)
    return found.error()


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's weight. ``block``: number in its list, None outside the blocks; ``share``: of all weights
    that were compared, 0 to 1."""

    name: str
    block: int | None
    rows: int
    columns: int
    format: str
    error: Error
    share: float = 0.0

    @property
    def list_name(self) -> str | None:
        """The list that its block is in, such as ``blocks``; None outside the blocks."""
        match = _BLOCK.match(self.name)
        return match["list"] if match else None

    @property
    def kind(self) -> str:
        """What all blocks have one of, such as ``self_attn.q``; the whole name outside the blocks."""
        match = _BLOCK.match(self.name)
        return match["kind"] if match else self.name

    @property
    def pattern(self) -> str:
        """Kind and list with a star for the block: ``blocks.*.self_attn.q``."""
        return self.name if self.block is None else f"{self.list_name}.*.{self.kind}"


class Accuracy:
    """Errors of layers, as they come; ``forward`` is that of a whole forward, where one was made."""

    def __init__(self) -> None:
        self.forward: Error | None = None
        self._layers: list[LayerError] = []

    def add(
        self, name: str, original: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, settings: Mapping[str, Any]
    ) -> None:
        """One converted weight: what quant.convert calls for each when it is given this as ``measured``.

        original: ``[rows, columns]``, float, on any device; stored, scale: what it became, as quantize returns them;
        settings: its JSON. Dequantized in slices of rows. Raises ValueError for settings of no known format.
        """
        stored_as = _format_of(settings)
        rows = max(1, ROWS_SLICE // max(1, original.shape[1]))
        found = ErrorSum()
        for start in range(0, original.shape[0], rows):
            part = slice(start, start + rows)
            restored = dequantize(stored[part], scale[part] if scale.dim() == 2 else scale, stored_as, settings)
            found.add(restored, original[part].to(restored.device))
        self.record(name, tuple(original.shape), stored_as.name, found.error())

    def compare(self, name: str, original: torch.Tensor, result: torch.Tensor, format_name: str) -> None:
        """One weight against another of the same shape; see ``error``."""
        self.record(name, tuple(original.shape), format_name, error(result, original))

    def record(self, name: str, shape: Sequence[int], format_name: str, found: Error) -> None:
        """The error of a weight of ``shape``, ``[rows, ...]``. ``name``: of the layer or its weight, with or without the
        prefix that a whole checkpoint gives it."""
        name = _PREFIX.sub("", name).removesuffix(".weight")
        match = _BLOCK.match(name)
        rows = shape[0] if shape else 1
        block = int(match["block"]) if match else None
        self._layers.append(LayerError(name, block, rows, prod(shape[1:]), format_name, found))

    @property
    def layers(self) -> list[LayerError]:
        """All layers in the order in which they came."""
        total = sum(layer.rows * layer.columns for layer in self._layers)
        return [replace(layer, share=layer.rows * layer.columns / max(1, total)) for layer in self._layers]

    @property
    def changed(self) -> list[LayerError]:
        """Layers that are not equal to the bit."""
        return [layer for layer in self.layers if layer.error.relative != 0]

    def suffering(self) -> list[LayerError]:
        """Layers that the RULE finds, the worst first."""
        found = []
        for layers in _grouped(self.changed, lambda layer: layer.format).values():
            errors = [layer.error.relative for layer in layers if isfinite(layer.error.relative)]
            middle = statistics.median(errors) if errors else 0.0
            spread = MAD_TO_SIGMA * statistics.median(abs(each - middle) for each in errors) if errors else 0.0
            highest = min(LOST, max(TIMES_MEDIAN * middle, middle + DEVIATIONS * spread, NEGLIGIBLE))
            found += [layer for layer in layers if not layer.error.relative <= highest]
        return _worst_first(found)

    def summary(self) -> list[str]:
        """A line for each format, and one for what is equal."""
        lines = []
        for name, layers in _grouped(self.changed, lambda layer: layer.format).items():
            worst = _worst_first(layers)[0]
            middle = median(layers)
            lines.append(
                f"{_count(len(layers), 'layer')} {name}, {percent(sum(layer.share for layer in layers))} of the weights: "
                f"relative error {percent(middle.relative)} ({decibels(middle.snr_db)}) in the middle, "
                f"{percent(worst.error.relative)} at worst ({worst.name})"
            )
        equal = len(self._layers) - len(self.changed)
        if equal:
            lines.append(f"{_count(equal, 'layer')} equal to the bit")
        return lines or ["No layer was compared."]

    def table(self) -> list[str]:
        """The summary, a line for each kind of layer, and the worst ten layers, in columns of a fixed width."""
        lines = self.summary()
        if not self.changed:
            return lines
        groups = list(_grouped(self.changed, lambda layer: (layer.pattern, layer.format)).items())
        head = ("kind of layer", "format", "layers", "of weights", "median", "worst", "SNR of it")
        rows = [
            (
                pattern,
                name,
                str(len(layers)),
                percent(sum(layer.share for layer in layers)),
                percent(median(layers).relative),
                percent(_worst_first(layers)[0].error.relative),
                decibels(_worst_first(layers)[0].error.snr_db),
            )
            for (pattern, name), layers in groups
        ]
        lines += ["", *_columns(head, rows), ""]
        head = ("worst layers", "format", "size", "relative error", "SNR", "cosine", "largest difference")
        rows = [
            (
                layer.name,
                layer.format,
                f"{layer.rows} x {layer.columns}",
                percent(layer.error.relative),
                decibels(layer.error.snr_db),
                f"{layer.error.cosine:.6f}",
                f"{layer.error.worst:.3g}",
            )
            for layer in _worst_first(self.changed)[:WORST]
        ]
        return lines + _columns(head, rows)

    def warnings(self) -> list[str]:
        """A line for each kind of layer that suffers, with a pattern for ``keep_high_precision`` that keeps just these
        layers; the rule is the last line. Empty where none suffers."""
        lines = []
        medians = {name: median(found) for name, found in _grouped(self.changed, lambda layer: layer.format).items()}
        for layers in _grouped(self.suffering(), lambda layer: (layer.pattern, layer.format)).values():
            first = layers[0]
            blocks = sorted(layer.block for layer in layers if layer.block is not None)
            where = f" in {_count(len(blocks), 'block')} ({', '.join(map(str, blocks))})" if blocks else ""
            usual = medians[first.format].relative
            lines.append(
                f"{first.pattern} suffers{where}: relative error up to {percent(first.error.relative)}, where "
                f"{percent(usual)} is the median of {first.format}. To keep it ({percent(sum(layer.share for layer in layers))} of "
                f"the weights), add to keep_high_precision, with a | between: {keep_pattern(layers)}"
            )
        return [*lines, RULE] if lines else []

    def picture(self, title: str = "Accuracy of the weights") -> Image:
        """Relative error by block and kind of layer: an RGB picture 1400 pixels wide, as high as the layers need."""
        from .accuracy_picture import draw_accuracy

        return draw_accuracy(self, title)

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON has them; what is not finite is None."""
        return {
            "forward": None if self.forward is None else _json_error(self.forward),
            "layers": [
                {**asdict(layer), "kind": layer.kind, "list": layer.list_name, "error": _json_error(layer.error)}
                for layer in self.layers
            ],
            "suffering": [layer.name for layer in self.suffering()],
            "keep": keep_pattern(self.suffering()),
            "warnings": self.warnings(),
        }


def keep_pattern(layers: Iterable[LayerError]) -> str:
    """A regular expression that finds the names of just these layers, as ``keep_high_precision`` takes it; empty for
    none."""
    parts = []
    for (list_name, kind), found in _grouped(layers, lambda layer: (layer.list_name, layer.kind)).items():
        if list_name is None:
            parts.append(rf"(^|\.){re.escape(kind)}$")
            continue
        blocks = "|".join(str(layer.block) for layer in sorted(found, key=lambda layer: layer.block or 0))
        blocks = f"({blocks})" if len(found) > 1 else blocks
        parts.append(rf"(^|\.){re.escape(list_name)}\.{blocks}\.{re.escape(kind)}$")
    return "|".join(parts)


def percent(ratio: float) -> str:
    """Up to three digits: 0.02641 -> ``2.64%``; ``NaN`` and ``inf`` as they are."""
    if isnan(ratio):
        return "NaN"
    return f"{100 * ratio:.3g}%" if ratio < 10 else f"{100 * ratio:.0f}%"


def decibels(level: float) -> str:
    """One digit behind the point."""
    return "NaN" if isnan(level) else f"{level:.1f} dB"


def median(layers: Sequence[LayerError]) -> Error:
    """The error of the layer in the middle, the upper one of two; numbers before what is none."""
    ordered = sorted(layers, key=lambda layer: (isnan(layer.error.relative), layer.error.relative))
    return ordered[len(ordered) // 2].error


def _worst_first(layers: Iterable[LayerError]) -> list[LayerError]:
    return sorted(layers, key=lambda layer: inf if isnan(layer.error.relative) else layer.error.relative, reverse=True)


def _format_of(settings: Mapping[str, Any]) -> Format:
    """The format whose layers have these settings; a weight that could not be rotated is one without rotation."""
    rotated = bool(settings.get("convrot"))
    for each in FORMATS.values():
        if each.comfy == settings.get("format") and bool(each.convrot) == rotated:
            return each
    raise ValueError(f"no known format has the settings {dict(settings)}")


def _grouped(layers: Iterable[LayerError], key: Callable[[LayerError], Hashable]) -> dict[Any, list[LayerError]]:
    groups: dict[Any, list[LayerError]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]


def _json_error(found: Error) -> dict[str, float | None]:
    figures = {**asdict(found), "snr_db": found.snr_db}
    return {name: figure if isfinite(figure) else None for name, figure in figures.items()}
