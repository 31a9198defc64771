"""Machines without an NVIDIA card, builds of PyTorch for other cards, and old drivers."""

import subprocess
import sys

import pytest
import torch
from intelligent_vram.vram import nvml
from intelligent_vram.vram.device import NoDevice, resolve, why_not_stream
from intelligent_vram.vram.page_lock import CudaRegistrar

pynvml = pytest.importorskip("pynvml")

CUDA = torch.device("cuda", 0)

# Starting a device takes seconds and its memory, fails on builds for others, and decides for the host what it may still set.
LISTING = """
import torch

def touched(*args, **kwargs):
    raise AssertionError("a device was touched")

for name in ("_lazy_init", "init", "device_count", "is_available", "current_device", "get_device_properties", "mem_get_info"):
    setattr(torch.cuda, name, touched)
torch._C._cuda_init = touched

import intelligent_vram as pack
from intelligent_vram import vram

for node in pack.NODE_CLASS_MAPPINGS.values():
    try:
        (getattr(node, "INPUT_TYPES", None) or node.GET_SCHEMA)()
    except ModuleNotFoundError as missing:  # its lists of files are the host's
        assert missing.name in ("comfy", "folder_paths"), missing
for name in vram.__all__:
    getattr(vram, name)
vram.SwapConfig(offload_device="cuda:1")
print(len(pack.NODE_CLASS_MAPPINGS))
"""


def test_listing_the_nodes_and_importing_the_engine_touches_no_device():
    ran = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 5


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cpu", "no device memory"),
        ("xpu", "Intel"),
        ("mps", "Apple"),
        ("privateuseone", "DirectML"),
        ("vulkan", "vulkan"),
    ],
)
def test_models_on_other_devices_are_passed_by_with_the_reason(kind, words):
    assert words in why_not_stream(torch.device(kind))


def test_cuda_devices_are_streamed_to_also_where_pytorch_is_built_for_rocm():
    assert why_not_stream(CUDA) is None


@pytest.mark.parametrize("name", ["xpu", "mps", "meta", "privateuseone:0"])
def test_the_engine_itself_refuses_other_devices_by_name(name):
    with pytest.raises(NoDevice, match="cannot be used"):
        resolve(name)


# -- what answers and what does not --------------------------------------------------------------------------------------


class Properties:
    uuid = "1b2c"
    total_memory = 1 << 34


@pytest.fixture
def card(monkeypatch):
    """NVML as it is with a card, up to the question that the test lets fail."""
    nvml._initialise.cache_clear()
    nvml._handle.cache_clear()
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    yield monkeypatch
    nvml._initialise.cache_clear()
    nvml._handle.cache_clear()


def error(code):
    return pynvml.NVMLError(code)


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_GPU_IS_LOST,
    ],
)
def test_a_question_that_an_old_driver_does_not_know_is_missing_and_says_why(card, code):
    def fail(*_):
        raise error(code)

    card.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", fail)
    answer, reason = nvml.process_memory(CUDA)
    assert answer is None
    assert "nvmlDeviceGetComputeRunningProcesses" in reason


def test_a_question_that_the_binding_does_not_know_is_missing(card):
    answer, reason = nvml.ask(CUDA, "nvmlDeviceGetSomethingNew")
    assert answer is None
    assert "nvmlDeviceGetSomethingNew" in reason


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    ],
)
def test_nvml_that_does_not_start_is_missing(card, code):
    def fail():
        raise error(code)

    card.setattr(pynvml, "nvmlInit", fail)
    answer, reason = nvml.process_memory(CUDA)
    assert answer is None
    assert reason.startswith("NVML cannot be used")


@pytest.mark.parametrize("failure", [AttributeError("no uuid"), RuntimeError("CUDA error: the device is lost")])
def test_a_torch_that_does_not_name_the_card_and_a_lost_one_are_missing(card, failure):
    def fail(device):
        raise failure

    card.setattr(torch.cuda, "get_device_properties", fail)
    answer, reason = nvml.process_memory(CUDA)
    assert answer is None
    assert str(failure) in reason


def test_on_rocm_nvml_is_not_asked(card):
    card.setattr(torch.version, "hip", "6.4.43482")
    answer, reason = nvml.process_memory(CUDA)
    assert answer is None
    assert "ROCm" in reason


class Runtime:
    """The CUDA runtime as torch gives it out, with the answers that a driver may give."""

    def __init__(self, status):
        self.status = status

    def cudaHostRegister(self, address, nbytes, flags):
        return self.status

    def cudaHostUnregister(self, address):
        return self.status

    def cudaGetErrorString(self, status):
        return f"error string {int(status)}"


@pytest.mark.parametrize(
    "status", [1, 2, 201, 304, 712, 801]
)  # invalid value, no memory, ..., already registered, not supported
def test_page_locking_that_an_old_driver_refuses_is_an_answer_in_words(monkeypatch, status):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(status))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    registrar = CudaRegistrar(torch.device("cpu"))
    wanted = f"CUDA error {status}, error string {status}"
    assert (registrar.register(4096, 4096), registrar.unregister(4096)) == (wanted, wanted)


@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA error: unspecified launch failure"), AttributeError("no cudaHostRegister")]
)
def test_a_runtime_that_does_not_answer_is_an_answer_in_words_too(monkeypatch, failure):
    def fail():
        raise failure

    monkeypatch.setattr(torch.cuda, "cudart", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    registrar = CudaRegistrar(torch.device("cpu"))
    assert registrar.register(4096, 4096) == registrar.unregister(4096) == str(failure)
