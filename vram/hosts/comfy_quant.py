"""Quantized weights in ComfyUI: which formats the running one reads, a MODEL from a quantized state or file, and whether its
matrix products are done in the quantized format.

ComfyUI's quantized-checkpoint format (comfy/ops.py, _load_quantized_module): beside a layer's ``weight`` its ``weight_scale``
and ``comfy_quant``, a JSON in bytes. Before it, ComfyUI read only FP8, marked by a tensor ``scaled_fp8``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args

from .. import coding
from ..encoded import EncodedTensor
from ..encoded_file import is_encoded, load_encoded
from ..inspect_weights import FP8_MULTIPLE, KITCHEN_CUDA
from ..model_facts import SHARD
from ..model_files import read_header
from ..units import GIB, format_bytes
from . import planning
from .quant_choice import E4M3, E5M2, INT8, SCALED_FP8, Reads

log = logging.getLogger(__name__)

TENSOR_CORES, DEQUANTIZE = COMPUTE = ("tensor cores", "dequantize")
MARK = ".comfy_quant"
FULL_PRECISION = "full_precision_matrix_mult"
LAYERS = "_quantization_metadata"  # in a file's metadata: what older writers say of layers, instead of MARK
FP8_DTYPES = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
CONVERSION_VRAM = GIB  # what a conversion takes at most
INT8_CAPABILITY = (7, 5)

State = dict[str, torch.Tensor]


# -- what the host reads -------------------------------------------------------------------------------------------------


def reads() -> Reads:
    """What the running ComfyUI reads. Raises RuntimeError when what it needs for that is not installed."""
    try:
        from comfy import quant_ops
    except ImportError:
        return Reads(frozenset(), convrot=False, scaled=hasattr(comfy.ops, "scaled_fp8_ops"))
    if not getattr(quant_ops, "_CK_AVAILABLE", True):
        raise RuntimeError(
            "this ComfyUI computes with quantized weights by the package comfy-kitchen, which is missing, or older than it "
            "wants; install what ComfyUI's requirements.txt names (pip install -r requirements.txt) and start it again"
        )
    algorithms = getattr(quant_ops, "QUANT_ALGOS", {})
    convrot = False
    if INT8 in algorithms:
        layout = quant_ops.get_layout_class(algorithms[INT8]["comfy_tensor_layout"])
        convrot = "convrot" in getattr(layout.Params, "__dataclass_fields__", ())
    return Reads(frozenset(algorithms), convrot, scaled=hasattr(comfy.ops, "scaled_fp8_ops"))


def remarks(formats: set[str], compute: str) -> list[str]:
    """What the running ComfyUI and its card cannot do with weights in these of its ``formats``, in sentences."""
    if not formats:
        return []
    device = comfy.model_management.get_torch_device()
    found = []
    fp8, int8 = formats & {E4M3, E5M2}, INT8 in formats
    if compute == DEQUANTIZE:
        return ["compute: weights are dequantized for each layer, and multiplied as those of a 16-bit model are"]
    if E4M3 in fp8 and not comfy.model_management.supports_fp8_compute(device):
        found.append(
            "compute: this device has no FP8 matrix products (they need CUDA and compute capability 8.9): FP8 weights are "
            "dequantized for each layer"
        )
    elif E4M3 in fp8:
        found.append("compute: FP8 matrix products")
    if E5M2 in fp8:
        found.append("compute: e5m2 weights are always dequantized, tensor cores do not multiply e5m2 by e5m2")
    if int8 and device.type != "cuda":
        found.append("compute: INT8 products, without INT8 kernels on this device: this is slow")
    elif int8 and torch.cuda.get_device_capability(device) < INT8_CAPABILITY:
        found.append(
            "compute: INT8 kernels need compute capability 7.5: this card is slow with them, dequantize is faster"
        )
    elif int8:
        found.append("compute: INT8 matrix products")
    cuda = torch.version.cuda
    if device.type == "cuda" and cuda is not None and int(cuda.partition(".")[0]) < KITCHEN_CUDA:
        found.append(
            f"compute: PyTorch is built for CUDA {cuda}; the fast kernels of comfy-kitchen need one for CUDA {KITCHEN_CUDA}"
        )
    return found


def conversion_device() -> torch.device:
    """Where weights are quantized: the host's device where that is CUDA's, else the CPU."""
    device = comfy.model_management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")


@contextlib.contextmanager
def room_on(device: torch.device) -> Iterator[None]:
    """Room for a conversion on ``device``, where models that the host has loaded make it; given back at the end."""
    if device.type != "cuda":
        yield
        return
    comfy.model_management.free_memory(CONVERSION_VRAM, device)
    try:
        yield
    finally:
        comfy.model_management.soft_empty_cache()


# -- models --------------------------------------------------------------------------------------------------------------


def load_state(make: Callable[[], State], metadata: Mapping[str, str], name: str, compute: str, static: bool) -> Any:
    """A MODEL of the state that ``make`` returns, names without prefix, a new one at each call: the model keeps its tensors.

    metadata: of the file that it came from. name: of the model, for messages. static: without dynamic VRAM, which would hold
    weights that are in no file twice. Raises ValueError when ComfyUI does not recognise the model or does not read its
    formats.
    """
    return _load_state(make, dict(metadata), name, compute, disable_dynamic=static)


def load_file(path: Path, compute: str) -> Any:
    """The MODEL of a file as ComfyUI loads it; ``compute`` is honoured where the file is quantized. Raises as ``load_state``
    does."""
    return _load_file(path, compute)


def _load_state(
    make: Callable[[], State], metadata: dict[str, str], name: str, compute: str, disable_dynamic: bool = False
) -> Any:
    model = _to_model(make(), metadata, name, compute, disable_dynamic)
    model.cached_patcher_init = (_load_state, (make, metadata, name, compute))
    return model


def _load_file(path: Path, compute: str, disable_dynamic: bool = False) -> Any:
    metadata = dict(read_header(path)[1])
    encoded = is_encoded(metadata)
    if encoded:
        state, file = load_encoded(path)
        metadata, disable_dynamic = dict(file.metadata), True
    else:
        state = comfy.utils.load_torch_file(str(path))
    state = _modernized(state, metadata)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    state = comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True) or state
    # these have the prefix, and have become MARKs
    metadata.pop(LAYERS, None)
    model = _to_model(
        dict(state), metadata, path.name, compute, disable_dynamic, _dtype_of_encoded(state) if encoded else None
    )
    if encoded:
        _keep_encoded(model.model.diffusion_model, state, path.name)
    model.cached_patcher_init = (_load_file, (path, compute))
    return model


def is_encoded_file(path: Path) -> bool:
    """Whether a safetensors file holds encoded weights (``intelligent-vram compress``)."""
    try:
        return is_encoded(read_header(path)[1])
    except (OSError, ValueError):
        return False  # who loads it says what is wrong with it


def _dtype_of_encoded(state: State) -> torch.dtype | None:
    """The dtype that most encoded weights have, if the device computes in it and the user asked ComfyUI for no other: it would
    cast weights to one that it likes better (Wan's bfloat16 to float16), and cast weights are not those that are encoded."""
    if any(chosen is True for option, chosen in vars(args).items() if option.endswith("_unet")):
        return None
    taken: Counter[torch.dtype] = Counter()
    for weight in state.values():
        if isinstance(weight, EncodedTensor):
            taken[weight.dtype] += weight.nbytes
    dtype = taken.most_common(1)[0][0] if taken else None
    usable = {
        torch.bfloat16: comfy.model_management.should_use_bf16,
        torch.float16: comfy.model_management.should_use_fp16,
    }.get(dtype)
    return dtype if usable is not None and usable(comfy.model_management.get_torch_device()) else None


def _keep_encoded(transformer: torch.nn.Module, state: State, name: str) -> None:
    """Let the weights that the host decoded while it loaded them be the encoded ones of the file again: those that it did not
    cast. Whoever reads them gets the plain values."""
    cast = kept = 0
    for path, weight in transformer.named_parameters():
        encoded = state.get(path)
        if not isinstance(encoded, EncodedTensor) or type(weight) is not torch.nn.Parameter:
            continue
        if (weight.dtype, weight.shape) == (encoded.dtype, encoded.shape):
            coding.swap(weight, encoded)
            kept += encoded.nbytes
        else:
            cast += encoded.nbytes
    if cast > kept:  # some the host always keeps in float32
        log.warning(
            "%s: ComfyUI computes this model in another dtype on this device; %s of its weights were cast for that, and are "
            "no longer encoded",
            name,
            format_bytes(cast),
        )


def _to_model(
    state: State,
    metadata: Mapping[str, str],
    name: str,
    compute: str,
    disable_dynamic: bool,
    dtype: torch.dtype | None = None,
) -> Any:
    """The host's own loader on ``state``; ``dtype``: that weights are to have, else the host chooses."""
    state = _modernized(state, metadata)
    _check_formats(state, name)
    set_compute(state, compute)
    load = comfy.sd.load_diffusion_model_state_dict
    rest = {key: text for key, text in metadata.items() if key != LAYERS}
    more = {"metadata": rest, "disable_dynamic": disable_dynamic}
    if dtype is not None:
        more["model_options"] = {"dtype": dtype}
    known = inspect.signature(load).parameters
    model = load(state, **{name: value for name, value in more.items() if name in known})
    if model is None:
        raise ValueError(
            f"{name}: ComfyUI does not recognise the model in it; it may be a text encoder, a VAE or a LoRA, or of a family "
            "that this ComfyUI is too old for"
        )
    if compute == DEQUANTIZE:
        _dequantize_int8(model)
    return model


def _modernized(state: State, metadata: Mapping[str, str]) -> State:
    """``state`` with all that it, or the file's metadata, says of quantized layers as MARKs, where the host knows these."""
    convert = getattr(comfy.utils, "convert_old_quants", None)
    return state if convert is None else convert(state, "", metadata=dict(metadata))[0]


def _check_formats(state: State, name: str) -> None:
    """Raises ValueError for layers in formats that the host does not read: an old one would compute noise with them."""
    marked = {key: str(_settings(state[key]).get("format")) for key in state if key.endswith(MARK)}
    known = reads().algorithms if marked else frozenset()
    for key, algorithm in marked.items():
        if algorithm not in known:
            raise ValueError(
                f"{name}: its layer {key.removesuffix(MARK)} is in the format {algorithm:.32}, which this ComfyUI does not "
                "read; update ComfyUI"
            )


def _settings(mark: torch.Tensor) -> dict[str, Any]:
    return json.loads(bytes(mark.tolist()))


# -- how quantized weights are multiplied --------------------------------------------------------------------------------


def set_compute(state: State, compute: str) -> None:
    """Make the FP8 layers of ``state``, in whichever layout, compute as ``compute`` says: it is changed in place. Layers of
    e5m2, and those with dimensions that no FP8 product takes, are always dequantized."""
    for name in [name for name in state if name.endswith(MARK)]:
        settings = _settings(state[name])
        wanted = {key: value for key, value in settings.items() if key != FULL_PRECISION}
        weight = state.get(f"{name.removesuffix(MARK)}.weight")
        odd = weight is not None and any(size % FP8_MULTIPLE for size in weight.shape)
        if compute == DEQUANTIZE or wanted.get("format") == E5M2 or (odd and FULL_PRECISION in settings):
            wanted[FULL_PRECISION] = True
        if wanted != settings:
            state[name] = torch.tensor(list(json.dumps(wanted).encode()), dtype=torch.uint8)
    if SCALED_FP8 in state and compute == DEQUANTIZE:
        state[SCALED_FP8] = torch.zeros(2, dtype=state[SCALED_FP8].dtype)  # two elements say so


def formats_of(model: Any) -> set[str]:
    """The host's names of the formats in which weights of the loaded MODEL are stored."""
    found = {getattr(module, "quant_format", None) for module in model.model.modules()}
    config = getattr(model.model, "model_config", None)
    scaled = FP8_DTYPES.get(getattr(config, SCALED_FP8, None))
    return {name for name in (*found, scaled) if name is not None}


def _dequantize_int8(model: Any) -> None:
    """ComfyUI multiplies INT8 weights in INT8 whatever FULL_PRECISION says; it dequantizes those that something wraps."""
    for name, module in model.model.named_modules():
        if getattr(module, "quant_format", None) == INT8:
            model.add_weight_wrapper(f"{name}.weight", _as_it_is)


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


# -- files ---------------------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    """Names of the model files that can be loaded by QuantizedModelLoader."""
    return [name for name in planning.model_names() if not name.lower().endswith(".gguf")]


def default_name(source: Path, quantization: str) -> str:
    """What the quantized file of ``source`` is called; of a model in several files by what these have in common."""
    shard = SHARD.fullmatch(source.name)
    return f"{shard[1] if shard else source.stem}_{quantization}"


def new_file(name: str) -> Path:
    """Where a model file called ``name`` is to be written: into the folder of diffusion models, and nowhere else. Raises
    ValueError for a name that is none."""
    stem = name.strip()
    stem = stem[: -len(".safetensors")] if stem.lower().endswith(".safetensors") else stem
    if (
        not stem
        or stem.startswith(".")
        or any(character in '/\\:*?"<>|' or not character.isprintable() for character in stem)
    ):
        raise ValueError(
            f"filename is {name!r}; it must be the name of a file without a folder, such as my_model_fp8: it is written "
            "into ComfyUI's folder diffusion_models"
        )
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    # its older name, unet, comes first where nothing was set
    folder = next((folder for folder in folders if folder.name != "unet"), folders[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}.safetensors"
