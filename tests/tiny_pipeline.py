"""A real diffusers modular pipeline, tiny, that makes a frame at each call and keeps all of them in its state."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)
modular = pytest.importorskip("diffusers.modular_pipelines", reason="this diffusers has no modular pipelines")
parameters = pytest.importorskip("diffusers.modular_pipelines.modular_pipeline_utils")
InputParam, OutputParam = parameters.InputParam, parameters.OutputParam

LAYERS = 4


class Denoise(modular.ModularPipelineBlocks):
    """The next latents from the last ones and from what a cache of keys and values holds, which it goes on filling."""

    model_name = "tiny"
    size = 64  # of the latents' sides
    device = "cpu"

    @property
    def description(self):
        return "makes the next latents"

    @property
    def inputs(self):
        return [
            InputParam("current_latents", type_hint=torch.Tensor),
            InputParam("block_idx", default=0, kwargs_type="indices"),
            InputParam("kv_cache"),
            InputParam("seed", default=0),
        ]

    @property
    def intermediate_outputs(self):
        return [OutputParam("current_latents"), OutputParam("kv_cache")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        latents = block.current_latents
        if latents is None:
            latents = torch.zeros(1, 4, self.size, self.size, device=self.device)
        if block.kv_cache is None:
            shape = (1, 256, 4, self.size)
            block.kv_cache = [{name: torch.zeros(shape, device=self.device) for name in "kv"} for _ in range(LAYERS)]
        generator = torch.Generator().manual_seed(block.seed + block.block_idx)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        context = torch.stack([layer["k"].mean() + layer["v"].mean() for layer in block.kv_cache]).sum()
        block.current_latents = 0.9 * latents + noise + context
        for layer in block.kv_cache:
            layer["k"][:, block.block_idx] = latents.mean()
            layer["v"][:, block.block_idx] = latents.std()
        self.set_block_state(state, block)
        return components, state


class Decode(modular.ModularPipelineBlocks):
    """A frame of the latents, added to all earlier ones; what the decoder remembers is new each time."""

    model_name = "tiny"

    @property
    def description(self):
        return "decodes and accumulates"

    @property
    def inputs(self):
        return [InputParam("current_latents", required=True), InputParam("videos"), InputParam("decoder_cache")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("videos"), OutputParam("decoder_cache")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        frame = block.current_latents[:, :3].repeat(1, 1, 4, 4)
        block.videos = [*(block.videos or ()), frame]
        block.decoder_cache = [frame.clone() for _ in range(3)]
        self.set_block_state(state, block)
        return components, state


class DecodeWith(Decode):
    """The same, but a call has to be given the colour."""

    @property
    def inputs(self):
        return [*super().inputs, InputParam("colour", required=True)]


def pipeline(decode=Decode, **sizes):
    """The pipeline; ``size`` and ``device`` as of Denoise."""
    denoise = type("Denoise", (Denoise,), sizes)
    blocks = {"model_name": "tiny", "block_classes": [denoise, decode], "block_names": ["denoise", "decode"]}
    return type("Tiny", (modular.SequentialPipelineBlocks,), blocks)().init_pipeline()


def calls(pipe, count, after=lambda number: None, seed=3):
    """The newest frame of each of so many calls, on the CPU, each continuing from the state that the last one returned."""
    state, frames = None, []
    for number in range(count):
        state = pipe(state=state, block_idx=number, seed=seed)
        frames.append(state.get("videos")[-1].cpu())
        after(number)
    return frames
