"""A running ComfyUI and tiny models for it, for tests that ask for them by name. Without a ComfyUI they are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .checkpoints import write_hunyuan, write_lora, write_wan
from .comfy import ComfyServer, Host, find_host
from .wanvideo import Sampler, find_wrapper, why_not_loaded, write_models

DYNAMIC_VRAM = (0, 15)  # the version that began with it
LORA_LAYERS = ("blocks.1.self_attn.q", "blocks.1.self_attn.o", "blocks.4.cross_attn.v", "blocks.4.ffn.2")


@pytest.fixture(scope="session")
def comfy_host() -> Host:
    """The ComfyUI of this machine."""
    host = find_host()
    if isinstance(host, str):
        pytest.skip(host)
    return host


@pytest.fixture(scope="session")
def comfy_server(comfy_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One running ComfyUI for all tests, in which this pack's nodes act on a CPU too.

    On a GPU without dynamic VRAM, which applies LoRAs and casts in other steps that round otherwise than loading the model.
    """
    base, args = tmp_path_factory.mktemp("comfyui"), []
    if comfy_host.cuda and comfy_host.version >= DYNAMIC_VRAM:
        args.append("--disable-dynamic-vram")
    with ComfyServer(comfy_host, base, args=args, env={"INTELLIGENT_VRAM_FORCE": "1"}) as server:
        yield server


@pytest.fixture(scope="session")
def wan(comfy_server: ComfyServer) -> str:
    """File name of a Wan text-to-video model with 6 blocks, bf16."""
    return write_wan(comfy_server.models / "diffusion_models" / "wan.safetensors").name


@pytest.fixture(scope="session")
def wan_vace(comfy_server: ComfyServer) -> str:
    """File name of a Wan VACE model with 4 blocks and 2 VACE blocks, bf16."""
    path = comfy_server.models / "diffusion_models" / "wan_vace.safetensors"
    return write_wan(path, blocks=4, vace_blocks=2).name


@pytest.fixture(scope="session")
def hunyuan(comfy_server: ComfyServer) -> str:
    """File name of a HunyuanVideo model with 2 double and 4 single blocks, bf16. Its conditioning is pooled."""
    return write_hunyuan(comfy_server.models / "diffusion_models" / "hunyuan.safetensors").name


@pytest.fixture(scope="session")
def wan_lora(comfy_server: ComfyServer, wan: str) -> str:
    """File name of a LoRA that changes layers of blocks 1 and 4 of `wan` and leaves the others alone."""
    checkpoint = comfy_server.models / "diffusion_models" / wan
    return write_lora(comfy_server.models / "loras" / "wan_lora.safetensors", checkpoint, LORA_LAYERS).name


@pytest.fixture(scope="session")
def wrapper(comfy_host: Host) -> Path:
    """The WanVideoWrapper of this machine."""
    found = find_wrapper(comfy_host)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def sampler(comfy_host: Host, wrapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """Tiny models of each kind on one running ComfyUI with the wrapper, in which this pack's nodes act on a CPU too."""
    base = tmp_path_factory.mktemp("wanvideo")
    models = write_models(base / "models")
    with ComfyServer(comfy_host, base, env={"INTELLIGENT_VRAM_FORCE": "1"}, packs=[wrapper]) as server:
        problem = why_not_loaded(server)
        if problem is not None:
            pytest.skip(problem)
        yield Sampler(server, models)
