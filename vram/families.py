"""Families of models: how to know one by the names of its weights, and what its shapes say of it.

Names that identify a family, and what follows from shapes, are those that ComfyUI goes by (comfy/model_detection.py);
the order in which modules are defined is that of its model classes (comfy/ldm). ``order`` matters where several layers
are moved at once: it says which ones lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

Shapes = Mapping[str, tuple[int, ...]]


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """A shape; empty where there is no such weight. The weight of an RMS norm is called ``scale`` in some files."""
    return shapes.get(name) or shapes.get(f"{name.removesuffix('weight')}scale", ())


@dataclass(frozen=True)
class At:
    """One number of a shape: dimension ``axis`` of weight ``name``, divided by ``divisor``, less ``less``."""

    name: str
    axis: int = 0
    divisor: int = 1
    less: int = 0

    def read(self, shapes: Shapes) -> int | None:
        """The number; None where there is no such weight, or it is no positive number."""
        shape = _shape(shapes, self.name)
        if not -len(shape) <= self.axis < len(shape):
            return None
        value = shape[self.axis] // self.divisor - self.less
        return value if value > 0 else None


# a weight that is there, or a number that a shape has
Mark = str | tuple[At, int]


def _has(shapes: Shapes, mark: Mark) -> bool:
    if isinstance(mark, str):
        return mark in shapes or f"{mark.removesuffix('weight')}scale" in shapes
    return mark[0].read(shapes) == mark[1]


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a model say of its computing; None where its family does not tell.

    dim: width of the residual stream. ffn_dim: width inside a block's feed-forward layers. num_heads, head_dim: of
    self-attention. text_dim: width of the text embeddings that it takes. in_channels, out_channels: of the latent.
    patch_size: latent frames, rows and columns (images: rows and columns) that become one token.
    """

    dim: int | None = None
    ffn_dim: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    text_dim: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    patch_size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """A family of models: one that has all ``marks``.

    ``patch`` is the patch size, or the name of the convolution that has it; ``head`` the width of a head, where not their
    number ``heads`` is fixed. ``kinds``: the first of these marks that a model has tells what kind it is. ``order``: names
    of modules as they are defined, at any depth; of a name that is there twice the first counts. ``renames`` are made in names when a model is loaded. The others are as
    in Sizes, but ``out_channels`` before division by the patch.
    """

    name: str
    marks: tuple[Mark, ...]
    dim: At | None = None
    ffn_dim: At | None = None
    text_dim: At | None = None
    in_channels: At | None = None
    out_channels: At | None = None
    patch: tuple[int, ...] | str | None = None
    head: int | At | None = None
    heads: int | None = None
    kinds: tuple[tuple[Mark, str], ...] = ()
    order: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def fits(self, shapes: Shapes) -> bool:
        """Whether a model with these weights is of this family."""
        return all(_has(shapes, mark) for mark in self.marks)

    def kind(self, shapes: Shapes) -> str:
        """What kind of model of the family it is, in words; empty where that is not known."""
        return next((words for mark, words in self.kinds if _has(shapes, mark)), "")

    def sizes(self, shapes: Shapes) -> Sizes:
        """What the shapes say."""
        dim = self.dim.read(shapes) if self.dim else None
        head = self.head.read(shapes) if isinstance(self.head, At) else self.head
        if head is None and self.heads and dim:
            head = dim // self.heads
        patch = self.patch
        if isinstance(patch, str):
            patch = _shape(shapes, patch)[2:] or None
        out = self.out_channels.read(shapes) if self.out_channels else None
        return Sizes(
            dim=dim,
            ffn_dim=self.ffn_dim.read(shapes) if self.ffn_dim else None,
            num_heads=dim // head if dim and head and dim % head == 0 else None,
            head_dim=head if dim and head and dim % head == 0 else None,
            text_dim=self.text_dim.read(shapes) if self.text_dim else None,
            in_channels=self.in_channels.read(shapes) if self.in_channels else None,
            out_channels=out // math.prod(patch) if out and patch and math.prod(patch) else None,
            patch_size=patch,
        )

    def loaded_name(self, name: str) -> str:
        """The name that the weight ``name`` of a file has in the loaded model."""
        for old, new in self.renames:
            name = name.replace(old, new)
        return name


UNKNOWN = Family("unknown", ())

_FLUX_BLOCK = "double_blocks.0.img_attn.norm.key_norm.weight"
_FLUX_ORDER = (
    *("img_in", "time_in", "vector_in", "guidance_in", "txt_in", "txt_norm", "distilled_guidance_layer"),
    *("double_blocks", "single_blocks"),
    *("img_mod", "img_attn", "img_mlp", "txt_mod", "txt_attn", "txt_mlp"),
    *(
        "linear1",
        "linear2",
        "qkv",
        "norm",
        "query_norm",
        "key_norm",
        "proj",
        "modulation",
        "lin",
        "in_layer",
        "out_layer",
    ),
    *("in_proj", "layers", "norms", "out_proj", "gate_proj", "up_proj", "down_proj"),
    *("final_layer", "linear", "adaLN_modulation"),
    *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
)
_FLUX = Family(
    "Flux",
    (_FLUX_BLOCK, "img_in.weight"),
    dim=At("img_in.weight"),
    ffn_dim=At("double_blocks.0.img_mlp.0.weight"),
    text_dim=At("txt_in.weight", 1),
    in_channels=At("img_in.weight", 1, 4),
    out_channels=At("final_layer.linear.weight"),
    patch=(2, 2),
    head=At(_FLUX_BLOCK),
    order=_FLUX_ORDER,
)
_LUMINA = Family(
    "Lumina 2",
    ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
    dim=At("cap_embedder.1.weight"),
    ffn_dim=At("layers.0.feed_forward.w1.weight"),
    text_dim=At("cap_embedder.1.weight", 1),
    in_channels=At("x_embedder.weight", 1, 4),
    out_channels=At("final_layer.linear.weight"),
    patch=(2, 2),
    head=At("noise_refiner.0.attention.k_norm.weight"),
    order=(
        *("x_embedder", "noise_refiner", "context_refiner", "t_embedder", "cap_embedder", "layers"),
        *("attention", "qkv", "out", "q_norm", "k_norm", "feed_forward", "w1", "w2", "w3"),
        *("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2", "adaLN_modulation"),
        *("siglip_embedder", "siglip_refiner", "norm_final", "linear", "final_layer"),
    ),
)
_LTX_MARK = "adaln_single.emb.timestep_embedder.linear_1.bias"
_LTX = Family(
    "LTX-Video",
    (_LTX_MARK, "transformer_blocks.0.attn2.to_k.weight"),
    dim=At("patchify_proj.weight"),
    ffn_dim=At("transformer_blocks.0.ff.net.0.proj.weight"),
    text_dim=At("caption_projection.linear_1.weight", 1),
    in_channels=At("patchify_proj.weight", 1),
    out_channels=At("proj_out.weight"),
    patch=(1, 1, 1),
    heads=32,
    order=(
        *("patchify_proj", "adaln_single", "prompt_adaln_single", "emb", "timestep_embedder"),
        *("caption_projection", "in_norm", "linear_1", "linear_2", "linear", "transformer_blocks"),
        *("attn1", "q_norm", "k_norm", "to_q", "to_k", "to_v", "to_gate_logits", "to_out", "ff", "attn2"),
        *("norm_out", "proj_out"),
    ),
)
_WAN = Family(
    "Wan",
    ("head.modulation", "blocks.0.ffn.0.weight"),
    dim=At("head.modulation", -1),
    ffn_dim=At("blocks.0.ffn.0.weight"),
    text_dim=At("text_embedding.0.weight", 1),
    in_channels=At("patch_embedding.weight", 1),
    out_channels=At("head.head.weight"),
    patch="patch_embedding.weight",
    head=128,
    kinds=(
        ("vace_patch_embedding.weight", "2.1 VACE"),
        ("control_adapter.conv.weight", "camera control"),
        ("casual_audio_encoder.encoder.final_linear.weight", "2.2 speech-to-video"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "2.2 Animate"),
        ("patch_embedding_pose.weight", "SCAIL"),
        ("patch_embedding_global.weight", "WanDancer"),
        ("img_emb.proj.0.bias", "2.1 image-to-video"),
        ((At("patch_embedding.weight", 1), 16), "2.1/2.2 text-to-video"),
        ((At("patch_embedding.weight", 1), 36), "2.2 image-to-video"),
        ((At("patch_embedding.weight", 1), 48), "2.2 text/image-to-video"),
    ),
    order=(
        *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks"),
        *("self_attn", "q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img"),
        *("norm3", "cross_attn", "ffn", "audio_cross_attn_wrapper", "audio_cross_attn", "norm1_audio"),
        *("before_proj", "after_proj", "head", "img_emb", "ref_conv", "vace_blocks", "vace_patch_embedding"),
        *("control_adapter", "audio_proj", "trainable_cond_mask", "casual_audio_encoder", "cond_encoder"),
        *("audio_injector", "frame_packer"),
    ),
)

# The first that fits counts. Of some only the name is known.
FAMILIES = (
    Family(
        "SD3",
        ("joint_blocks.0.context_block.attn.qkv.weight",),
        dim=At("x_embedder.proj.weight"),
        ffn_dim=At("joint_blocks.0.x_block.mlp.fc1.weight"),
        text_dim=At("context_embedder.weight", 1),
        in_channels=At("x_embedder.proj.weight", 1),
        out_channels=At("final_layer.linear.weight"),
        patch="x_embedder.proj.weight",
        head=64,
    ),
    Family("Stable Audio", ("transformer.rotary_pos_emb.inv_freq",)),
    Family("AuraFlow", ("double_layers.0.attn.w1q.weight",)),
    Family("Hunyuan-DiT", ("mlp_t5.0.weight",)),
    Family(
        "HunyuanVideo",
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight"),
        dim=At("img_in.proj.weight"),
        ffn_dim=At("double_blocks.0.img_mlp.0.weight"),
        text_dim=At("txt_in.input_embedder.weight", 1),
        in_channels=At("img_in.proj.weight", 1),
        out_channels=At("final_layer.linear.weight"),
        patch="img_in.proj.weight",
        head=128,
        order=(
            *("img_in", "time_in", "vector_in", "guidance_in", "txt_in"),
            *("input_embedder", "t_embedder", "c_embedder", "individual_token_refiner"),
            *("linear", "adaLN_modulation", "norm1", "self_attn", "norm2", "mlp"),
            *("double_blocks", "single_blocks", "byt5_in", "time_r_in"),
            *_FLUX_ORDER[_FLUX_ORDER.index("img_mod") :],
            *("vision_in", "cond_type_embedding", "layernorm", "fc1", "fc2", "fc3"),
        ),
        renames=(
            ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
            ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
            ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
            ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
            ("_mod.linear.", "_mod.lin."),
            ("_attn_qkv.", "_attn.qkv."),
            ("mlp.fc1.", "mlp.0."),
            ("mlp.fc2.", "mlp.2."),
            ("_attn_q_norm.", "_attn.norm.query_norm."),
            ("_attn_k_norm.", "_attn.norm.key_norm."),
            (".q_norm.", ".norm.query_norm."),
            (".k_norm.", ".norm.key_norm."),
            ("_attn_proj.", "_attn.proj."),
            (".modulation.linear.", ".modulation.lin."),
            ("_in.mlp.2.", "_in.out_layer."),
            ("_in.mlp.0.", "_in.in_layer."),
        ),
    ),
    replace(_FLUX, name="Chroma Radiance", marks=(_FLUX_BLOCK, "nerf_blocks.0.norm.weight"), patch=None),
    replace(_FLUX, name="Chroma", marks=(_FLUX_BLOCK, "distilled_guidance_layer.norms.0.weight")),
    replace(
        _FLUX,
        name="Flux 2",
        marks=(_FLUX_BLOCK, "double_stream_modulation_img.lin.weight"),
        # the first layer makes two halves, one of which gates the other
        ffn_dim=At("double_blocks.0.img_mlp.0.weight", 0, 2),
        in_channels=At("img_in.weight", 1),
        patch=(1, 1),
    ),
    _FLUX,
    Family("Mochi", ("t5_yproj.weight",)),
    replace(_LTX, name="LTX-Video 2", marks=(*_LTX.marks, "audio_adaln_single.linear.weight")),
    _LTX,
    Family("ACE-Step", ("genre_embedder.weight",)),
    Family("PixArt", ("t_block.1.weight",)),
    Family("Cosmos", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    replace(_LUMINA, name="Z-Image", marks=(*_LUMINA.marks, (_LUMINA.dim, 3840))),
    _LUMINA,
    Family("CogVideoX", ("blocks.0.norm1.linear.weight",)),
    Family("SeedVR2", ("blocks.31.mlp.all.proj_in_gate.weight",)),
    Family("SeedVR2", ("blocks.35.mlp.vid.proj_out.weight",)),
    _WAN,
    Family("Hunyuan3D", ("latent_in.weight", "double_blocks.0.img_attn.qkv.weight")),
    Family("HiDream", ("caption_projection.0.linear.weight",)),
    Family(
        "Cosmos Predict2",
        ("blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"),
        dim=At("x_embedder.proj.1.weight"),
        ffn_dim=At("blocks.0.mlp.layer1.weight"),
        text_dim=At("blocks.0.cross_attn.k_proj.weight", 1),
        in_channels=At("x_embedder.proj.1.weight", 1, 4, 1),  # a mask comes with the latent
        out_channels=At("final_layer.linear.weight"),
        patch=(1, 2, 2),
        head=128,
    ),
    Family("OmniGen2", ("time_caption_embed.timestep_embedder.linear_1.bias",)),
    Family(
        "Qwen-Image",
        ("txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        dim=At("img_in.weight"),
        ffn_dim=At("transformer_blocks.0.img_mlp.net.0.proj.weight"),
        text_dim=At("txt_in.weight", 1),
        in_channels=At("img_in.weight", 1, 4),
        out_channels=At("proj_out.weight"),
        patch=(2, 2),
        head=At("transformer_blocks.0.attn.norm_q.weight"),
        order=(
            *("time_text_embed", "timestep_embedder", "linear_1", "linear_2", "addition_t_embedding"),
            *("txt_norm", "img_in", "txt_in", "transformer_blocks", "img_mod", "img_mlp", "txt_mod", "txt_mlp", "attn"),
            *("norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_q", "to_k", "to_v"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out", "net", "norm_out", "proj_out"),
        ),
    ),
    Family("Kandinsky 5", ("visual_transformer_blocks.0.cross_attention.key_norm.weight",)),
    Family("Krea 2", ("txtfusion.projector.weight",)),
    Family("Stable Diffusion", ("input_blocks.0.0.weight",)),
)


def recognise(shapes: Shapes) -> Family:
    """The family of a model with weights of these names and shapes; UNKNOWN where none fits."""
    return next((family for family in FAMILIES if family.fits(shapes)), UNKNOWN)
