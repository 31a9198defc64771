"""What users install: the registry's metadata, requirements that leave the host's torch alone, the archive, and a quick start."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOSTS_OWN = {"torch", "numpy"}  # ComfyUI brings them, and another build must not replace them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def requirements() -> list[str]:
    lines = read("requirements.txt").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", NAME.match(requirement)[0]).lower()


def archive_files() -> list[str]:
    """Paths in the registry's archive, by its rule: all files of the repository, less those that .comfyignore names.

    Files that are new count, as if they were committed.
    """

    def listed(*args: str) -> set[str]:
        result = subprocess.run(["git", "ls-files", "-z", *args], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"not in a git repository: {result.stderr.strip()}")
        return {path for path in result.stdout.split("\0") if path and (ROOT / path).is_file()}

    ignored = ["--ignored", "--exclude-from=.comfyignore"]
    left_out = listed("--cached", *ignored) | listed("--others", *ignored)
    return sorted(listed("--cached", "--others", "--exclude-standard") - left_out)


def test_manager_installs_nothing_that_could_replace_the_torch_or_numpy_of_comfyui() -> None:
    seen: set[str] = set()
    waiting = [name_of(requirement) for requirement in requirements()]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [name_of(requirement) for requirement in needed if "extra ==" not in requirement]
    assert seen & (HOSTS_OWN | {"torchvision", "torchaudio", "triton", "xformers"}) == set()
    assert not any(name.startswith("nvidia-") and name != "nvidia-ml-py" for name in seen)


def test_requirements_and_pyproject_name_the_same_packages() -> None:
    declared = PROJECT["project"]["dependencies"]
    assert sorted(requirements()) == sorted(need for need in declared if name_of(need) not in HOSTS_OWN)
    assert {name_of(need) for need in declared} >= HOSTS_OWN
    assert not [need for need in requirements() if re.search(r"==|<|~=", need)], "a pin fights with the host's versions"


def test_every_package_of_the_code_is_installed() -> None:
    root = {"intelligent_vram"}
    folders = {Path(path).parent for path in archive_files() if path.endswith(".py")} - {Path(), Path("docs/images")}
    found = root | {f"intelligent_vram.{'.'.join(folder.parts)}" for folder in folders}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_metadata_is_what_the_registry_asks_for() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?![-_.]))*[a-z0-9]", project["name"])
    assert len(project["name"]) < 100
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    systems = {"Operating System :: POSIX :: Linux", "Operating System :: Microsoft :: Windows"}
    assert systems | {"Environment :: GPU :: NVIDIA CUDA"} <= set(project["classifiers"])
    assert not [line for line in project["classifiers"] if line.startswith("Environment ::") and ":: GPU" not in line]
    assert project["urls"].keys() >= {"Repository", "Documentation", "Bug Tracker"}
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert comfy.keys() >= {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy, "WEB_DIRECTORY names the front end's folder; both would load it twice"


@pytest.mark.parametrize(("field", "size"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_icon_and_banner_are_there_in_the_registrys_size(field: str, size: tuple[int, int]) -> None:
    path = PROJECT["tool"]["comfy"][field].split("/main/")[1]
    with Image.open(ROOT / path) as image:
        assert image.size == size


def test_the_changelog_begins_with_this_version() -> None:
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == PROJECT["project"]["version"]


def test_the_archive_holds_what_runs_and_no_tests() -> None:
    files = archive_files()
    folders = {path.split("/")[0] for path in files if "/" in path}
    assert {"nodes", "vram", "quant", "cli", "web", "locales", "docs"} <= folders
    assert folders & {"tests", "examples", ".github", ".ci"} == set()
    assert [path for path in files if path.startswith("benchmarks/")] == ["benchmarks/README.md"]
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= set(files)
    assert [path for path in files if path.endswith((".safetensors", ".zip", ".whl", ".log", ".pyc"))] == []
    assert sum((ROOT / path).stat().st_size for path in files) < 8 * 1024**2


def test_comfy_cli_accepts_the_metadata_and_packs_the_same_files(tmp_path: Path) -> None:
    comfy = shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is not installed")
    kept = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for path in filter(None, kept.stdout.split("\0")):
        if (ROOT / path).is_file():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    for action in ("validate", "pack"):
        command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node", action]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert not re.search(r"warning|error", result.stdout, re.IGNORECASE), result.stdout
    with zipfile.ZipFile(tmp_path / "node.zip") as archive:
        assert sorted(archive.namelist()) == archive_files()


def test_links_in_the_documents_lead_to_files_that_are_in_the_archive_too() -> None:
    files = set(archive_files())
    broken = {}
    for page in sorted(path for path in files if path.endswith(".md") and not path.startswith("web/")):
        links = re.findall(r"\]\(([^)#\s]+)", read(page))
        targets = [link for link in links if not re.match(r"https?:", link)]
        found = {(ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT).as_posix() for link in targets}
        if missing := sorted(path for path in found if path not in files):
            broken[page] = missing
    assert broken == {}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_figures_in_the_readme_are_the_benchmarks_figures(page: str) -> None:
    measured = [float(text) for text in re.findall(r"\d+\.\d+", read("benchmarks/README.md"))]
    section = re.search(r"^## (?:Figures|测量数据)$(.*?)^## ", read(page), re.MULTILINE | re.DOTALL)[1]
    cells = " ".join(line.split("|", 2)[2] for line in section.splitlines() if re.match(r"\| [^|]*[^|\s-]", line))
    told = re.findall(r"\d+\.\d+", cells)
    assert len(told) > 20
    assert [
        text for text in told if not any(f"{value:.{len(text.split('.')[1])}f}" == text for value in measured)
    ] == []


def test_both_readmes_have_the_same_parts_in_the_same_order() -> None:
    def shape(text: str) -> list[tuple[str, int, int]]:
        code = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
        parts = re.split(r"^## ", text, flags=re.MULTILINE)
        return [("blocks of code and links", len(code), text.count("]("))] + [
            ("rows and bold paragraphs", part.count("\n|"), part.count("\n**")) for part in parts
        ]

    assert shape(read("README.md")) == shape(read("README.zh.md"))


IMPORT = """
import json, sys
import psutil, torch  # what ComfyUI has loaded when it comes to custom nodes
before = set(sys.modules)
import intelligent_vram
json.dump(sorted(set(sys.modules) - before), sys.stdout)
"""
LATER = (
    "quant",
    "cli",
    "vram.drawing",
    "vram.picture",
    "vram.advise",
    "vram.swap",
    "vram.growth",
    "vram.kv_",
    "vram.pipeline_state",
)
HOST = ("vram.hosts.comfy", "vram.hosts.wanvideo", "vram.hosts.planning")


def test_importing_the_pack_loads_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    modules = json.loads(result.stdout)
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"intelligent_vram"}
    assert foreign == set()
    parts = tuple(f"intelligent_vram.{name}" for name in LATER + HOST)
    assert [name for name in modules if name.startswith(parts)] == []
