"""Exact sizes of a model from the headers of its files, before anything is loaded.

>>> facts = read_model("wan2.1_t2v_14B_bf16.safetensors")
>>> facts.description, facts.block_lists
('Wan 2.1/2.2 text-to-video 14B, 40 blocks, bf16', {'blocks': 40})
>>> packed = facts.layers(SwapConfig(block_size=300 << 20))
>>> stream_all(cut(packed.layers, 300 << 20), slots=3).device_bytes

What a header cannot tell: buffers that are computed when a model is built, weights that are tied in memory, and where
modules of an unknown family are defined in another order than their file or the alphabet has them (then sizes are right, but
units of several layers may be cut elsewhere).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .config import SwapConfig
from .discover import WHOLE, NoBlocks, Scope, find_blocks, tensor_bytes
from .families import Family, Sizes, recognise
from .inspect_weights import FP8, Unreadable
from .layout import align, plain_tensors
from .model_files import SAFETENSORS_DTYPES
from .model_headers import AGAIN, LONGEST_HEADER, ModelUnreadable, Weight, check_json, read_weights
from .plan import LayerSize, arrange
from .rest import sort_tensors
from .stand_in import Sized, stand_in

# what checkpoints put before the names of the transformer's weights (comfy/model_detection.py, and LoRA trainers)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")
ENOUGH = 5  # weights that make a prefix one of the whole model
# tensors that tell a loader something and are no weights
MARKS = ("comfy_quant", "scaled_fp8", "__x0__", "__sequential__", "__index_timestep_zero__")
SCALES = ("_scale", "_scale_2", "scale_weight", "scale_input")
# weights that a host casts to the dtype that it computes in
FLOATS = ("float64", "float32", "float16", "bfloat16")
TORCH_NAMES = frozenset(name for name, _ in SAFETENSORS_DTYPES.values())
COUNTERS = ("int64", "bool")  # what is stored in these are buffers
SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "INT8", "uint8": "4 bit"}

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.safetensors|\.sft|\.gguf)", re.IGNORECASE)
MOST_SHARDS = 1000


@dataclass(frozen=True)
class PackedSizes:
    """What the engine makes of a model: ``layers`` that it packs, in order, as planning takes them, with their ``paths``;
    the bytes of the ``rest``, which it keeps on the device all the time; and of all weights ``beside`` the packed ones, whoever
    places them."""

    layers: tuple[LayerSize, ...]
    paths: tuple[str, ...]
    rest_bytes: int
    beside_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed weights, alignment included."""
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True)
class ModelFacts:
    """A model as the headers of its files describe it. Sizes in bytes, as they are in the files.

    weights: those of the transformer, in the files' order, without ``prefix``. beside_bytes: of what else is in the files
    (a checkpoint with its text encoder and VAE).
    """

    paths: tuple[str, ...]
    prefix: str
    weights: tuple[Weight, ...] = field(repr=False)
    beside_bytes: int

    @cached_property
    def _family(self) -> Family:
        return recognise(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name. Of two 4-bit elements in a byte each counts."""
        packed = {weight.name for weight in self.weights if weight.dtype == "uint8"}
        packed &= {weight.name.removesuffix("_scale") for weight in self.weights}
        return {
            weight.name: (*weight.shape[:-1], 2 * weight.shape[-1])
            if weight.name in packed and weight.shape
            else weight.shape
            for weight in self.weights
        }

    @property
    def family(self) -> str:
        """Such as "Wan", "Flux", "Qwen-Image"; "unknown" where the names of weights are of none that is known."""
        return self._family.name

    @cached_property
    def sizes(self) -> Sizes:
        """Widths, heads, channels and patches, as far as the family tells."""
        return self._family.sizes(self._shapes)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, without the scales of quantized ones."""
        return sum(math.prod(self._shapes[weight.name]) for weight in self._loaded if not _is_scale(weight.name))

    @cached_property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes by dtype, the most first: torch's names, and GGUF's for its quantized types."""
        counts: Counter[str] = Counter()
        for weight in self.weights:
            counts[weight.dtype] += weight.nbytes
        return dict(counts.most_common())

    @property
    def total_bytes(self) -> int:
        """Bytes of the transformer's weights."""
        return sum(self.bytes_by_dtype.values())

    @cached_property
    def quantization(self) -> str | None:
        """How most of the weights are quantized: "FP8", "scaled FP8", "INT8", "4 bit", "GGUF Q4_K"; None: they are not."""
        dtype = next(iter(self.bytes_by_dtype), "")
        if dtype in FP8:
            return "scaled FP8" if any(_is_scale(weight.name) for weight in self.weights) else "FP8"
        if dtype in FLOATS or not dtype:
            return None
        return SHORT.get(dtype) or (f"GGUF {dtype}" if dtype not in TORCH_NAMES else dtype)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Paths of all blocks, in order of definition; empty where a model has none of the known lists."""
        try:
            return tuple(path for path, _ in find_blocks(self._as_in_files))
        except NoBlocks:
            return ()

    @cached_property
    def block_lists(self) -> dict[str, int]:
        """Lists of blocks by path, each with its number of blocks, in order of definition."""
        return dict(Counter(path.rpartition(".")[0] for path in self.blocks))

    def _by_block(self, amount: Callable[[Weight], int]) -> tuple[int, ...]:
        """The sum of ``amount`` over the weights of each of ``blocks``."""
        sums = dict.fromkeys(self.blocks, 0)
        for weight in self.weights:
            parts = self._family.loaded_name(weight.name).split(".")
            for end in range(2, len(parts)):
                block = ".".join(parts[:end])
                if block in sums:
                    sums[block] += amount(weight)
                    break
        return tuple(sums.values())

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each of ``blocks``."""
        return self._by_block(lambda weight: weight.nbytes)

    @cached_property
    def block_parameters(self) -> tuple[int, ...]:
        """Number of parameters of each of ``blocks``, without scales."""
        return self._by_block(lambda weight: 0 if _is_scale(weight.name) else math.prod(self._shapes[weight.name]))

    @property
    def inside_bytes(self) -> int:
        """Bytes of weights in blocks."""
        return sum(self.block_bytes)

    @property
    def description(self) -> str:
        """One line: family and kind, billions of parameters, blocks, dtype."""
        billions = self.parameters / 1e9
        size = f"{billions:.0f}B" if billions >= 9.95 else f"{billions:.1f}B" if billions >= 0.05 else "tiny"
        kind = self._family.kind(self._shapes)
        family = self.family if self.family != "unknown" else "Unknown family"
        dtype = next(iter(self.bytes_by_dtype), "no weights")
        return (
            f"{family}{f' {kind}' if kind else ''} {size}, {len(self.blocks) or 'no'} blocks, "
            f"{self.quantization or SHORT.get(dtype, dtype)}"
        )

    def layers(
        self,
        config: SwapConfig | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        dtype_of: Callable[[str], torch.dtype | None] | None = None,
        scope: Scope = WHOLE,
        first: Sequence[str] = (),
    ) -> PackedSizes:
        """The layers that ``attach`` would pack for ``config`` and ``scope``, to the byte, and what it would leave.

        compute_dtype: weights of 16 bits and more are loaded in it; None: as they are in the file. dtype_of: the dtype
        that a host loads a weight of that name in, whatever ``compute_dtype`` is; None: no exception. first: names of
        modules that a host defines before all others beside them.

        Raises NoBlocks where the model has no list of blocks that ``config`` names.
        """
        config = config or SwapConfig()

        def nbytes(weight: Weight) -> int:
            dtype = dtype_of(weight.name) if dtype_of is not None else None
            if dtype is None and weight.dtype in FLOATS and not _is_scale(weight.name):
                dtype = compute_dtype
            return weight.nbytes if dtype is None else weight.elements * dtype.itemsize

        sizes = [nbytes(weight) for weight in self._loaded]
        reordered = [name for name in first if any(f"{name}." in path for path in self._loaded_names)]
        as_in_files = not reordered and sizes == [weight.nbytes for weight in self._loaded]
        root = self._as_in_files if as_in_files else self._stand_in(sizes, reordered)
        streamed, rest = sort_tensors(root, config, scope)
        packed = [(sum(align(slotted.tensor.nbytes) for slotted in layer.tensors), layer.block) for layer in streamed]
        return PackedSizes(
            tuple(arrange(packed, config.block_size)),
            tuple(layer.path for layer in streamed),
            sum(slotted.tensor.nbytes for slotted in rest),
            sum(sizes) - sum(layer.nbytes for layer in streamed),
        )

    @cached_property
    def _loaded(self) -> tuple[Weight, ...]:
        """The weights, without what only tells a loader something."""
        return tuple(weight for weight in self.weights if weight.name.rpartition(".")[2] not in MARKS)

    @cached_property
    def _loaded_names(self) -> tuple[str, ...]:
        """What these are called in the loaded model."""
        return tuple(self._family.loaded_name(weight.name) for weight in self._loaded)

    @cached_property
    def _as_in_files(self) -> torch.nn.Module:
        """The model with the sizes of the files, which the engine only looks at."""
        return self._stand_in([weight.nbytes for weight in self._loaded], ())

    def _stand_in(self, sizes: Sequence[int], first: Sequence[str]) -> torch.nn.Module:
        are_buffers = (weight.dtype in COUNTERS for weight in self._loaded)
        sized = map(Sized, self._loaded_names, sizes, are_buffers)
        order = self._family.order
        return stand_in(sized, (*first, *order), keep_order=not order and not self._sorted)

    @cached_property
    def _sorted(self) -> bool:
        """Whether weights of a dtype are in the order of their names, as safetensors' own writer leaves them: it does not
        tell in which order modules are defined."""
        last: dict[str, str] = {}
        for weight in self.weights:
            if weight.name < last.get(weight.dtype, ""):
                return False
            last[weight.dtype] = weight.name
        return True


def _is_scale(name: str) -> bool:
    return name.endswith(SCALES)


# -- files ---------------------------------------------------------------------------------------------------------------

Source = str | os.PathLike[str]


def read_model(paths: Source | Sequence[Source]) -> ModelFacts:
    """The facts of the model in a .safetensors or .gguf file, in a set of such files (its index, any of them, or a list), by
    their headers alone.

    Raises ModelUnreadable for what is missing, cut off or no such file, naming the file.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else [*paths]
    if not given:
        raise ModelUnreadable("no file was given; name the model's .safetensors or .gguf file")
    files: dict[Path, None] = {}
    for path in map(Path, given):
        files.update(dict.fromkeys(_files_of(path)))
    if len(files) > MOST_SHARDS:
        raise ModelUnreadable(f"{len(files)} files are more than any model has; name those of one model")
    weights: dict[str, Weight] = {}
    found_in: dict[str, Path] = {}
    for file in files:
        for weight in read_weights(file):
            if weight.name in weights:
                raise ModelUnreadable(
                    f"{file}: its weight {weight.name} is in {found_in[weight.name].name} too; name the files of one model"
                )
            weights[weight.name] = weight
            found_in[weight.name] = file
    if not weights:
        raise ModelUnreadable(f"{next(iter(files))}: it has no weights. {AGAIN}")
    prefix = _prefix(weights)
    own = tuple(
        weight._replace(name=name.removeprefix(prefix)) if prefix else weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    )
    beside = sum(weight.nbytes for weight in weights.values()) - sum(weight.nbytes for weight in own)
    return ModelFacts(tuple(map(str, files)), prefix, own, beside)


def _prefix(names: Iterable[str]) -> str:
    """The first of PREFIXES that more than ENOUGH weights have, or all; empty when none."""
    names = list(names)
    some = [name for name in names if name.startswith(PREFIXES)]
    counts = {prefix: sum(name.startswith(prefix) for name in some) for prefix in PREFIXES}
    return next((prefix for prefix, count in counts.items() if count > ENOUGH or count == len(names)), "")


def _files_of(path: Path) -> list[Path]:
    """The files of the set that ``path`` is the index of, or one of; otherwise itself."""
    if path.name.lower().endswith(INDEX):
        names = _shards_in(path)
    elif (match := SHARD.fullmatch(path.name)) and 1 <= int(match[2]) <= int(match[3]):
        stem, number, count, suffix = match.groups()
        if int(count) > MOST_SHARDS:
            raise ModelUnreadable(f"{path}: it calls itself one of {count} files, more than any model has")
        names = [f"{stem}-{index:0{len(number)}}-of-{count}{suffix}" for index in range(1, int(count) + 1)]
    else:
        return [path]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelUnreadable(
            f"{path}: {len(missing)} of the {len(names)} files of this model are missing beside it, {missing[0]} first. "
            "Put all of them into one folder"
        )
    return [path.parent / name for name in names]


def _shards_in(path: Path) -> list[str]:
    """The names of files in an index."""
    try:
        if path.stat().st_size > LONGEST_HEADER:
            raise Unreadable(f"it is too long for an index. {AGAIN}")
        encoded = path.read_bytes()
        check_json(encoded)
        names = sorted(set(json.loads(encoded)["weight_map"].values()))
    except OSError as error:
        raise ModelUnreadable(f"{path}: it could not be read: {error.strerror or error}") from None
    except Unreadable as error:
        raise ModelUnreadable(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelUnreadable(f"{path}: it is no index of safetensors files ({error!r}). {AGAIN}") from None
    strange = [
        name for name in names if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.(safetensors|sft)", name)
    ]
    if strange or not names or len(names) > MOST_SHARDS:
        raise ModelUnreadable(
            f"{path}: {f'it names {strange[0]!r:.80}' if strange else f'it names {len(names)} files'}; "
            f"an index names .safetensors files beside it, up to {MOST_SHARDS}"
        )
    return names


def facts_of_tensors(tensors: Mapping[str, torch.Tensor], name: str = "loaded model") -> ModelFacts:
    """The facts of a model by the tensors of its state: names without prefix, as its modules have them. Tensors may be on the
    meta device; a quantized one counts what it holds."""
    weights = []
    for path, tensor in tensors.items():
        parts = list(plain_tensors(tensor))
        dtype = str(parts[0].dtype).removeprefix("torch.")
        quant = getattr(tensor, "quant_type", None)
        weights.append(
            Weight(
                path,
                dtype if quant is None else str(getattr(quant, "name", quant)),
                tuple(tensor.shape),
                sum(tensor_bytes(part) for part in parts),
            )
        )
    return ModelFacts((name,), "", tuple(weights), 0)
