"""Run ComfyUI's main.py on a PyTorch without CUDA: `python cpu_launcher.py COMFYUI_FOLDER [ComfyUI arguments]`.

ComfyUI itself is unchanged and gets `--cpu`. Three packages that it imports, but that sampling latents does not need,
may be in any state: torchvision without its operators, torchaudio absent, the workflow templates of another version.
"""

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch


class EmptyModule(ModuleType):
    """A package in which every public name is an empty class, to be imported, annotated with or derived from."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        self.__version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def tolerate_torchvision_without_operators() -> None:
    """Let `import torchvision` pass where its operators do not exist: it would register shape functions for them."""
    register_fake = torch.library.register_fake

    def register_known(op, *args, **kwargs):
        if str(op).startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register_known


def tolerate_missing_torchaudio() -> None:
    """Put an empty package in torchaudio's place where it cannot be imported."""
    try:
        import torchaudio  # noqa: F401
    except Exception:  # a build for other libraries fails with OSError or RuntimeError as well as ImportError
        sys.modules["torchaudio"] = package = EmptyModule("torchaudio")
        for child in ("functional", "transforms"):
            sys.modules[f"torchaudio.{child}"] = module = EmptyModule(f"torchaudio.{child}")
            setattr(package, child, module)


def hide_workflow_templates() -> None:
    """Let ComfyUI start as if the templates were not installed: older ones end on the newer package's layout."""
    sys.modules["comfyui_workflow_templates"] = None


def main() -> None:
    """Become ComfyUI: its folder first on the module path, its arguments in `sys.argv`."""
    root, *arguments = sys.argv[1:]
    script = Path(root).resolve() / "main.py"
    tolerate_torchvision_without_operators()
    tolerate_missing_torchaudio()
    hide_workflow_templates()
    sys.argv = [str(script), "--cpu", *(a for a in arguments if a != "--cpu")]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
