"""Tiny checkpoints with random weights that ComfyUI's own loaders recognise, and LoRAs for them.

Names and shapes are those that `comfy/model_detection.py` looks for. Weights depend on the seed alone; their scales
keep activations near 1 and let every block move the result, so that a wrong weight anywhere shows in the latent.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HEAD_DIM = 128
LATENT_CHANNELS = 16
FREQUENCY_DIM = 256
HUNYUAN_POOLED_DIM = 768


class _Weights(dict[str, torch.Tensor]):
    """Seeded random tensors by name."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def random(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self[name] = (torch.randn(shape, generator=self._generator) * std + mean).to(self._dtype)

    def layer(self, name: str, *shape: int) -> None:
        """A linear layer or convolution, [out, in, ...], whose outputs are about as large as its inputs."""
        self.random(f"{name}.weight", *shape, std=(shape[0] / torch.Size(shape).numel()) ** 0.5)
        self.random(f"{name}.bias", shape[0], std=0.02)

    def norm(self, name: str, width: int, *, bias: bool = False) -> None:
        self.random(f"{name}.weight", width, std=0.05, mean=1.0)
        if bias:
            self.random(f"{name}.bias", width, std=0.02)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(self), path)
        return path


def write_wan(
    path: Path,
    *,
    dim: int = 256,
    ffn_dim: int = 512,
    blocks: int = 6,
    vace_blocks: int = 0,
    image_channels: int = 0,
    text_dim: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a Wan 2.1 text-to-video model; with `vace_blocks`, a Wan VACE model; with `image_channels`, of which Wan 2.2 has
    20, one that takes so many channels of an image and its mask beside the latent. Returns the path.

    ComfyUI makes `dim // 128` heads of it. `blocks` must be a multiple of `vace_blocks`.
    """
    weights = _Weights(seed, dtype)
    weights.layer("patch_embedding", dim, LATENT_CHANNELS + image_channels, 1, 2, 2)
    weights.layer("text_embedding.0", dim, text_dim)
    weights.layer("text_embedding.2", dim, dim)
    weights.layer("time_embedding.0", dim, FREQUENCY_DIM)
    weights.layer("time_embedding.2", dim, dim)
    weights.layer("time_projection.1", 6 * dim, dim)
    for i in range(blocks):
        _wan_block(weights, f"blocks.{i}", dim, ffn_dim)
    if vace_blocks:
        weights.layer("vace_patch_embedding", dim, 6 * LATENT_CHANNELS, 1, 2, 2)
        weights.layer("vace_blocks.0.before_proj", dim, dim)
    for i in range(vace_blocks):
        _wan_block(weights, f"vace_blocks.{i}", dim, ffn_dim)
        weights.layer(f"vace_blocks.{i}.after_proj", dim, dim)
    weights.random("head.modulation", 1, 2, dim, std=0.5)
    weights.layer("head.head", 4 * LATENT_CHANNELS, dim)
    return weights.save(path)


def _wan_block(weights: _Weights, block: str, dim: int, ffn_dim: int) -> None:
    weights.random(f"{block}.modulation", 1, 6, dim, std=0.5)
    for attention in ("self_attn", "cross_attn"):
        for layer in "qkvo":
            weights.layer(f"{block}.{attention}.{layer}", dim, dim)
        weights.norm(f"{block}.{attention}.norm_q", dim)
        weights.norm(f"{block}.{attention}.norm_k", dim)
    weights.norm(f"{block}.norm3", dim, bias=True)
    weights.layer(f"{block}.ffn.0", ffn_dim, dim)
    weights.layer(f"{block}.ffn.2", dim, ffn_dim)


def write_wan_vae(path: Path, *, width: int = 24, seed: int = 0) -> Path:
    """Write a Wan 2.1 VAE in fp32. Returns the path.

    The real one has a width of 96, which older ComfyUI take for granted. Others read it from the file, and WanVideoWrapper
    knows 24 as a pruned one.
    """
    weights = _Weights(seed, torch.float32)
    widths = [width, 2 * width, 4 * width, 4 * width]
    weights.layer("encoder.conv1", width, 3, 3, 3, 3)
    _vae_stages(weights, "encoder.downsamples", width, widths, "down", blocks=2)
    _vae_ends(weights, "encoder", widths[-1], widths[-1], 2 * LATENT_CHANNELS)
    weights.layer("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    weights.layer("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)
    weights.layer("decoder.conv1", widths[-1], LATENT_CHANNELS, 3, 3, 3)
    _vae_stages(weights, "decoder.upsamples", widths[-1], widths[::-1], "up", blocks=3)
    _vae_ends(weights, "decoder", widths[-1], width, 3)
    return weights.save(path)


def _vae_stages(
    weights: _Weights, name: str, width: int, widths: Sequence[int], direction: str, *, blocks: int
) -> None:
    """Stages of a number of blocks each, between which the picture becomes smaller, or larger, and in two of three
    cases the time too."""
    index = 0
    for stage, after in enumerate(widths):
        for _ in range(blocks):
            _vae_block(weights, f"{name}.{index}", width, after)
            width, index = after, index + 1
        if stage == len(widths) - 1:
            return
        resized = after if direction == "down" else after // 2
        weights.layer(f"{name}.{index}.resample.1", resized, after, 3, 3)
        if direction == "down" and stage > 0:
            weights.layer(f"{name}.{index}.time_conv", after, after, 3, 1, 1)
        elif direction == "up" and stage < 2:
            weights.layer(f"{name}.{index}.time_conv", 2 * after, after, 3, 1, 1)
        width, index = resized, index + 1


def _vae_block(weights: _Weights, name: str, before: int, after: int) -> None:
    for norm, convolution, width in ((0, 2, before), (3, 6, after)):
        weights.random(f"{name}.residual.{norm}.gamma", width, 1, 1, 1, std=0.05, mean=1.0)
        weights.layer(f"{name}.residual.{convolution}", after, width, 3, 3, 3)
    if before != after:
        weights.layer(f"{name}.shortcut", after, before, 1, 1, 1)


def _vae_ends(weights: _Weights, name: str, middle: int, last: int, channels: int) -> None:
    """The blocks in the middle of an encoder or decoder, with attention between them, and its last layers."""
    for index in (0, 2):
        _vae_block(weights, f"{name}.middle.{index}", middle, middle)
    weights.random(f"{name}.middle.1.norm.gamma", middle, 1, 1, std=0.05, mean=1.0)
    weights.layer(f"{name}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
    weights.layer(f"{name}.middle.1.proj", middle, middle, 1, 1)
    weights.random(f"{name}.head.0.gamma", last, 1, 1, 1, std=0.05, mean=1.0)
    weights.layer(f"{name}.head.2", channels, last, 3, 3, 3)


def write_hunyuan(
    path: Path,
    *,
    dim: int = 256,
    double_blocks: int = 2,
    single_blocks: int = 4,
    text_dim: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a HunyuanVideo text-to-video model, which has two kinds of blocks in two lists. Returns the path.

    `dim` must be a multiple of 128. It samples from conditioning with a pooled part of 768.
    """
    weights = _Weights(seed, dtype)
    weights.layer("img_in.proj", dim, LATENT_CHANNELS, 1, 2, 2)
    embedders = {
        "time_in": 256,
        "vector_in": HUNYUAN_POOLED_DIM,
        "txt_in.t_embedder": 256,
        "txt_in.c_embedder": text_dim,
    }
    for name, width in embedders.items():
        weights.layer(f"{name}.in_layer", dim, width)
        weights.layer(f"{name}.out_layer", dim, dim)
    weights.layer("txt_in.input_embedder", dim, text_dim)
    for i in range(2):
        refiner = f"txt_in.individual_token_refiner.blocks.{i}"
        weights.layer(f"{refiner}.adaLN_modulation.1", 2 * dim, dim)
        weights.norm(f"{refiner}.norm1", dim, bias=True)
        weights.norm(f"{refiner}.norm2", dim, bias=True)
        _attention_and_mlp(weights, f"{refiner}.self_attn", f"{refiner}.mlp", dim)
    for i in range(double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            weights.layer(f"{block}_mod.lin", 6 * dim, dim)
            _attention_and_mlp(weights, f"{block}_attn", f"{block}_mlp", dim)
            weights.norm(f"{block}_attn_q_norm", HEAD_DIM)
            weights.norm(f"{block}_attn_k_norm", HEAD_DIM)
    for i in range(single_blocks):
        block = f"single_blocks.{i}"
        weights.layer(f"{block}.modulation.lin", 3 * dim, dim)
        weights.layer(f"{block}.linear1", 7 * dim, dim)
        weights.layer(f"{block}.linear2", dim, 5 * dim)
        weights.norm(f"{block}.q_norm", HEAD_DIM)
        weights.norm(f"{block}.k_norm", HEAD_DIM)
    weights.layer("final_layer.adaLN_modulation.1", 2 * dim, dim)
    weights.layer("final_layer.linear", 4 * LATENT_CHANNELS, dim)
    return weights.save(path)


def _attention_and_mlp(weights: _Weights, attention: str, mlp: str, dim: int) -> None:
    weights.layer(f"{attention}.qkv", 3 * dim, dim)
    weights.layer(f"{attention}.proj", dim, dim)
    weights.layer(f"{mlp}.0", 4 * dim, dim)
    weights.layer(f"{mlp}.2", dim, 4 * dim)


def write_lora(path: Path, checkpoint: Path, layers: Sequence[str], *, rank: int = 4, seed: int = 0) -> Path:
    """Write a LoRA for the named linear layers of a checkpoint, such as `blocks.1.self_attn.q`. Returns the path.

    At strength 1 it changes a layer's weight by about a quarter of that weight's size.
    """
    weights = _Weights(seed, torch.float32)
    with safe_open(checkpoint, "pt") as file:
        for layer in layers:
            rows, columns = file.get_slice(f"{layer}.weight").get_shape()
            weights.random(f"diffusion_model.{layer}.lora_A.weight", rank, columns, std=columns**-0.5)
            weights.random(f"diffusion_model.{layer}.lora_B.weight", rows, rank, std=0.25 * rank**-0.5)
    return weights.save(path)
