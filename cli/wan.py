"""A Wan 2.1 text-to-video transformer for demonstrations and benchmarks, inference only.

The layers, their order and their parameter names are those of the published checkpoints (Wan-AI/Wan2.1-T2V-14B:
``blocks.0.self_attn.q.weight``, ...), so what is measured here holds for the real model. Weights are random and seeded.

>>> config = WanConfig.small()
>>> model = random_model(config, torch.bfloat16, seed=0)
>>> noise = model(*sample_inputs(config, tokens=1024, dtype=torch.bfloat16))    # [1, 16, 4, 32, 32]

Activation memory is kept low, in units of one full-size activation X (tokens x dim elements; 320 MiB in bf16 for
32,760 tokens of width 5120). Alive at once are at most 5 X: the residual stream, which blocks update in place, and

- in self-attention three of q, k, v, their common input and the result: the input goes before attention begins;
- in the feed-forward layers one input or output and the hidden activation (2.7 X), whose GELU happens in place.

For that to hold nobody else may keep a reference to a layer's normalised input. A caller's frame keeps its arguments
alive, so attention and feed-forward get the function that makes their input (``prepare``), not the input itself.
Every linear layer is called as a module, once a forward: hooks that load weights see each use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

TOKENS_AT_ONCE = 2048  # in-place steps work on this many tokens at a time; bounds their temporaries
ROPE_BASE = 10_000.0
RANDOM_POOL = 2**24 + 43  # distinct random numbers behind all weights; prime, so no two rows of a matrix coincide
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
LATENTS = {1024: (4, 32, 32), 7800: (5, 60, 104), 32760: (21, 60, 104)}  # tokens: frames, height, width


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer. Raises ValueError if the heads do not divide the width into even parts."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int = 4096
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of even width")

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.dim // self.num_heads

    @classmethod
    def small(cls) -> WanConfig:
        """16 blocks of 11 MB, 191 MB in all in bf16: a model for a CPU, with the head width of the large one."""
        return cls(dim=640, ffn_dim=1792, num_heads=5, num_layers=16)


WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


def latent_shape_for_tokens(tokens: int) -> tuple[int, int, int]:
    """Frames, height and width of a latent that patches of (1, 2, 2) cut into exactly this many tokens.

    1,024, 7,800 (17 frames of 832x480) and 32,760 (81 frames of 832x480) are videos; any other number
    is one frame as square as its divisors allow. Raises ValueError below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be 1 or more, not {tokens}")
    if tokens in LATENTS:
        return LATENTS[tokens]
    rows = next(divisor for divisor in range(isqrt(tokens), 0, -1) if tokens % divisor == 0)
    return 1, 2 * rows, 2 * (tokens // rows)


def in_place(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Replace x [B, N, ...] by function(x), a run of tokens at a time, and return it."""
    for part in x.split(TOKENS_AT_ONCE, dim=1):
        part.copy_(function(part))
    return x


class InPlaceRMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis that overwrites its input [B, N, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return in_place(super().forward, x)


class InPlaceGELU(nn.GELU):
    """GELU that overwrites its input [B, N, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return in_place(super().forward, x)


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Overwrite normed [B, N, dim] with normed * (1 + scale) + shift, both [B, 1, dim], and return it."""
    return torch.addcmul(shift, normed, 1 + scale, out=normed)


def time_features(timestep: Tensor, freq_dim: int) -> Tensor:
    """Sinusoids [B, freq_dim], fp32, of timesteps [B] in 0..1000: cosines first, then sines."""
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * ROPE_BASE**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotations for tokens on a (frames, rows, columns) grid: complex64 [tokens, 1, head_dim / 2].

    A head's pairs are shared out between the axes as in Wan: a third of them (rounded down) each for rows and columns,
    the rest for frames.
    """
    third = head_dim // 6
    pairs = (head_dim // 2 - 2 * third, third, third)
    per_axis = []
    for axis, (length, count) in enumerate(zip(grid, pairs, strict=True)):
        exponents = torch.arange(count, dtype=torch.float32, device=device) / count
        positions = torch.arange(length, dtype=torch.float32, device=device)
        shape = [1, 1, 1, count]
        shape[axis] = length
        per_axis.append(torch.outer(positions, ROPE_BASE**-exponents).view(shape).expand(*grid, count))
    angles = torch.cat(per_axis, dim=-1).view(prod(grid), 1, head_dim // 2)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, rope: Tensor) -> None:
    """Apply rope [N, 1, head_dim / 2] to neighbouring pairs of heads [B, N, heads, head_dim], in place, in fp32."""
    for part, turn in zip(heads.split(TOKENS_AT_ONCE, dim=1), rope.split(TOKENS_AT_ONCE), strict=True):
        pairs = torch.view_as_complex(part.to(torch.float32, copy=True).unflatten(-1, (-1, 2)))
        part.copy_(torch.view_as_real(pairs.mul_(turn)).flatten(-2))


class WanAttention(nn.Module):
    """Self-attention, or cross-attention when it is given a context."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (InPlaceRMSNorm(dim, eps=config.eps) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        prepare: Callable[[Tensor], Tensor],
        context: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Attend from prepare(x) [B, N, dim] to itself, or to context [B, L, dim]; a new tensor [B, N, dim]."""
        hidden = prepare(x)
        source = hidden if context is None else context
        query = self.norm_q(self.q(hidden)).unflatten(-1, (-1, self.head_dim))
        key = self.norm_k(self.k(source)).unflatten(-1, (-1, self.head_dim))
        if rope is not None:
            rotate(query, rope)
            rotate(key, rope)
        value = self.v(source).unflatten(-1, (-1, self.head_dim))
        del hidden, source
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        del query, key, value
        return self.o(mixed.transpose(1, 2).flatten(2))


class WanFeedForward(nn.Sequential):
    """The two linear layers of a block."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim),
            InPlaceGELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )

    def forward(self, x: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """A new tensor [B, N, dim] from prepare(x) [B, N, dim]."""
        hidden = prepare(x)
        for layer in self:
            hidden = layer(hidden)
        return hidden


class WanAttentionBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = WanAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = WanAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = WanFeedForward(config)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """Update x [B, N, dim] in place and return it.

        time [B, 6, dim] shifts, scales and gates; context [B, text_len, dim] is the embedded text; rope as rope_table.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)
        x.addcmul_(self.self_attn(x, lambda t: modulated(self.norm1(t), shift1, scale1), rope=rope), gate1)
        x.add_(self.cross_attn(x, self.norm3, context=context))
        x.addcmul_(self.ffn(x, lambda t: modulated(self.norm2(t), shift2, scale2)), gate2)
        return x


class WanHead(nn.Module):
    """From the residual stream to patches of the result."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, N, out_dim * patch elements] from x [B, N, dim] and the embedded time [B, dim]."""
        shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)
        return self.head(modulated(self.norm(x), shift, scale))


class WanModel(nn.Module):
    """The Wan 2.1 text-to-video transformer, without gradients.

    Weights are uninitialised: build it on ``torch.device("meta")`` and give it weights, as load_checkpoint and
    random_model do. Weights and inputs share one dtype.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(config) for _ in range(config.num_layers))
        self.head = WanHead(config)
        self.requires_grad_(False)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Predict [B, out_dim, F, H, W] from a latent [B, in_dim, F, H, W], timesteps [B] in 0..1000 and text
        [B, L, text_dim]; the result has the latent's dtype.

        Text shorter than config.text_len is padded with zeros, as in Wan. Raises ValueError when it is longer and
        when patches do not divide the latent.
        """
        config = self.config
        if any(size % patch for size, patch in zip(latent.shape[2:], config.patch_size, strict=True)):
            raise ValueError(f"latent of shape {tuple(latent.shape)} does not split into patches {config.patch_size}")
        if text.shape[1] > config.text_len:
            raise ValueError(f"text has {text.shape[1]} tokens, more than {config.text_len}")
        time = self.time_embedding(time_features(timestep, config.freq_dim).to(latent.dtype))
        modulation = self.time_projection(time).unflatten(1, (6, config.dim))
        context = self.text_embedding(F.pad(text, (0, 0, 0, config.text_len - text.shape[1])))
        grid = tuple(size // patch for size, patch in zip(latent.shape[2:], config.patch_size, strict=True))
        rope = rope_table(grid, config.head_dim, latent.device)
        x = self.patch_embedding(latent).flatten(2).transpose(1, 2).contiguous()
        # The feed-forward activation is the largest of all. Asked for first, its memory stays in PyTorch's allocator
        # and serves q and k too; asked for after them, it comes on top of theirs.
        x.new_empty(*x.shape[:2], config.ffn_dim)
        for block in self.blocks:
            x = block(x, modulation, context, rope)
        return self.unpatchify(self.head(x, time), grid)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, out_dim, F, H, W] from patches [B, N, patch elements * out_dim] on a grid."""
        patches = patches.unflatten(2, (*self.config.patch_size, self.config.out_dim)).unflatten(1, grid)
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # b c f pf h ph w pw
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def meta_model(config: WanConfig) -> WanModel:
    """The model's structure on the meta device, without memory for weights."""
    with torch.device("meta"):
        return WanModel(config).eval()


def random_weights(
    config: WanConfig, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Names and freshly allocated seeded weights in the model's order; the same values on any device.

    Normal: of deviation 1 / sqrt(fan-in) for matrices, 1 / sqrt(dim) for modulation, 0.02 for biases; norm weights
    are 1 + 0.1 * normal. Values come from one pool of random numbers, read from a random place for each tensor,
    because drawing 14 billion numbers takes minutes.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(RANDOM_POOL, generator=generator).to(device=device, dtype=dtype)
    for name, shape in [(name, p.shape) for name, p in meta_model(config).named_parameters()]:
        start = int(torch.randint(RANDOM_POOL, (), generator=generator))
        mean = 0.0
        if name.endswith("modulation"):
            scale = config.dim**-0.5
        elif name.endswith("bias"):
            scale = 0.02
        elif len(shape) == 1:
            scale, mean = 0.1, 1.0
        else:
            scale = prod(shape[1:]) ** -0.5
        weight = torch.empty(shape, dtype=dtype, device=device)
        rest = weight.view(-1)
        while len(rest):
            run = pool[start : start + len(rest)]
            torch.mul(run, scale, out=rest[: len(run)])
            rest, start = rest[len(run) :], 0
        yield name, weight.add_(mean) if mean else weight


def random_model(config: WanConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> WanModel:
    """A model with random_weights in memory, without a file."""
    model = meta_model(config)
    model.load_state_dict(dict(random_weights(config, dtype, seed, device)), assign=True)
    return model


def write_checkpoint(
    config: WanConfig, path: str | os.PathLike[str], dtype: torch.dtype, seed: int = 0, progress: bool = True
) -> None:
    """Write random_weights as one safetensors file, one tensor in memory at a time.

    The file appears under its name when it is complete. With progress, a bar is shown if it takes over a second.
    Format: https://huggingface.co/docs/safetensors (length of the header, JSON header, data). Raises ValueError for
    a dtype other than bf16, fp16 and fp32.
    """
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"cannot write random weights as {dtype}: use one of {list(SAFETENSORS_DTYPES)}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, parameter in meta_model(config).named_parameters():
        end = total + parameter.numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(parameter.shape),
            "data_offsets": [total, end],
        }
        total = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    bar = tqdm(total=total, desc=f"Writing {path.name}", unit="B", unit_scale=True, delay=1, disable=not progress)
    with bar, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, weight in random_weights(config, dtype, seed):
            file.write(weight.view(-1).view(torch.uint8).numpy())
            bar.update(weight.nbytes)
    partial.replace(path)


def load_checkpoint(path: str | os.PathLike[str], config: WanConfig) -> WanModel:
    """A model over the weights of a safetensors file, which stay mapped from it until they are first used.

    Raises RuntimeError naming the tensors when the file and the config do not fit.
    """
    model = meta_model(config)
    model.load_state_dict(load_file(path), assign=True)
    return model


def sample_inputs(
    config: WanConfig, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded arguments for WanModel: latent [1, in_dim, F, H, W], timestep [1] in fp32, text [1, text_len, text_dim].

    The values are the same on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, config.in_dim, *latent_shape_for_tokens(tokens), generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    return latent.to(device, dtype), torch.full((1,), 500.0, device=device), text.to(device, dtype)
