"""What a stranger's file, workflow or request must not do: run code, read or write elsewhere, or add ways in."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import intelligent_vram
import pytest
import torch
from intelligent_vram.cli.main import main
from intelligent_vram.cli.wan import WanConfig, random_model
from intelligent_vram.quant.convert import plan_conversion
from intelligent_vram.quant.source import Refused
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram.hosts import panel
from intelligent_vram.vram.inspect_weights import Unreadable
from intelligent_vram.vram.model_facts import read_model

from ..host.comfy import Host, find_host

SMALL = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=16, freq_dim=16, in_dim=4, out_dim=4, text_len=8
)

ROOT = Path(intelligent_vram.__file__).resolve().parent
MODULES = [
    ROOT / "__init__.py",
    *(path for part in ("nodes", "vram", "quant", "cli") for path in (ROOT / part).rglob("*.py")),
]
# modules that run, load or fetch what a stranger wrote, or that answer requests
FORBIDDEN = (
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "subprocess",
    "socket",
    "http",
    "urllib",
    "requests",
    "server",
    "aiohttp",
    "yaml",
)
# model_files.py names pickle.UnpicklingError, which torch.load raises; panel.py has the routes, which are tested below
EXCEPTED = {("vram/model_files.py", "pickle"), ("vram/hosts/panel.py", "aiohttp")}
LAUNCHER = Path(__file__).resolve().parent.parent / "host" / "cpu_launcher.py"


def nodes_of(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_runs_text_starts_programs_fetches_or_serves(path):
    place = path.relative_to(ROOT).as_posix()
    for node in nodes_of(path):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top not in FORBIDDEN or (place, top) in EXCEPTED, f"{place} imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"), (
            f"{place}: {called}"
        )
        if called == "torch.load":
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords), (
                place
            )


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "m.bin", "m.safetensors", "m.gguf", "m.sft"])
@pytest.mark.parametrize("how", ["pickle", "torch", "torch of old"])
def test_a_pickle_is_never_run_whatever_it_is_called(tmp_path, name, how):
    path, target = tmp_path / name, tmp_path / "it ran"
    state = {"blocks.0.w": torch.zeros(2), "bad": Payload(target)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    assert main(["doctor", str(path)]) in (1, 2)
    with pytest.raises(Unreadable):
        read_model(path)
    with pytest.raises(Refused):
        plan_conversion(path, "int8")
    assert not target.exists()


def test_an_index_leads_to_no_file_outside_its_folder(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x" * 64)
    index = folder / "m.safetensors.index.json"
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "a/../../secret.safetensors",
        "..\\secret.sft",
    ):
        index.write_text(json.dumps({"weight_map": {"blocks.0.w": name}}))
        with pytest.raises(Unreadable) as refused:
            read_model(index)
        assert "secret" not in str(refused.value) or "names" in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path):
    for name in ("m.safetensors", "m.gguf", "m.pt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(Unreadable, match="no such file"):
            read_model(tmp_path / name)
        assert main(["doctor", str(tmp_path / name)]) == 2


# -- routes --------------------------------------------------------------------------------------------------------------

BODIES = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b'{"client": 1, "what": "panel"}', b'{"client": "stranger", "what": "panel"}',
    b'{"client": "known", "what": "../../etc/passwd"}', b'{"client": "known", "what": ["panel"]}', b'{"client": ["known"], "what": {}}',
    b'{"client": "known", "what": "panel", "on": "no"}', b'{"client": "known", "what": "nodes", "path": "/etc/passwd"}',
    b"[" * 100_000, b"\xff\xfe",
]  # fmt: skip


class Server:
    """What the pack's routes see of ComfyUI's server."""

    def __init__(self, web):
        self.routes, self.sockets, self.sent = web.RouteTableDef(), {"known": object()}, []

    def send_sync(self, event, data, client):
        self.sent.append((event, data, client))


class Request:
    """A request with a body."""

    def __init__(self, body):
        self.body = body

    async def json(self):
        return json.loads(self.body)


def texts_in(value):
    """All keys and texts of a JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


@pytest.fixture
def routes(monkeypatch):
    """The pack's routes on a server, by path, and the server."""
    web = pytest.importorskip("aiohttp.web")
    server = Server(web)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    panel.serve()
    yield {route.path: route.handler for route in server.routes}, server
    for client, what in (("known", "panel"), ("known", "nodes")):
        getattr(server, panel.EVENT).remove(client, what)
    for thread in threading.enumerate():
        if thread.name == "intelligent-vram-panel":
            thread.join(5)
            assert not thread.is_alive()


def test_the_routes_are_those_that_are_known_and_refuse_what_they_do_not_know(routes):
    handlers, server = routes
    assert sorted(handlers) == [panel.STATE, panel.WATCH]
    for body in BODIES:
        try:
            answer = asyncio.run(handlers[panel.WATCH](Request(body)))
        except RecursionError:
            assert body.startswith(b"[[")  # the server answers 500 and lives
            continue
        told = json.loads(answer.body)
        assert [*told] == ["seconds"]
        assert answer.status in (200, 400, 404)
    assert {client for _, _, client in server.sent} <= {"known"}


def test_the_routes_tell_numbers_and_known_names_and_no_path(routes):
    handlers, _ = routes
    model = random_model(SMALL, torch.float32)
    swap = attach(model, SwapConfig(), "cpu")
    panel.attached(swap, "7")
    answer = asyncio.run(handlers[panel.STATE](Request(b"")))
    texts = [*texts_in(json.loads(answer.body))]
    swap.detach()
    assert texts
    assert not [text for text in texts if "/" in text or "\\" in text or len(text) > 2000]


# -- inside ComfyUI ------------------------------------------------------------------------------------------------------

ASK = """
import importlib.util, json, sys
sys.path[:0] = [{root!r}, {pack!r}]
specification = importlib.util.spec_from_file_location("cpu_launcher", {launcher!r})
launcher = importlib.util.module_from_spec(specification)
specification.loader.exec_module(launcher)
launcher.tolerate_torchvision_without_operators()
launcher.tolerate_missing_torchaudio()
sys.argv = ["main.py", "--cpu", "--base-directory", {base!r}]
import comfy.options
comfy.options.enable_args_parsing()
from intelligent_vram.vram.hosts import comfy_quant, planning
answers = []
for name in json.loads(sys.stdin.read()):
    for function in (planning.file_of, comfy_quant.new_file):
        try:
            answers.append([name, str(function(name))])
        except (ValueError, FileNotFoundError):
            answers.append([name, None])
print(json.dumps(answers))
"""
OUTSIDE = [
    "../secret.safetensors", "..\\secret.safetensors", "a/../../../secret.safetensors", "/etc/passwd", "C:\\x.safetensors",
    "C:x", "//server/share/x", ".hidden", "..", ".", "", " ", "a\x00b", "a\nb", "x/y", "~/x", "a:b", "file:///etc/passwd", "con?",
]  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Host:
    found = find_host()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.host
def test_names_in_a_workflow_lead_to_no_file_outside_the_model_folders(host, tmp_path):
    models = tmp_path / "base" / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / "known.safetensors").write_bytes(b"x")
    (tmp_path / "base" / "models" / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "base" / "secret.safetensors").write_bytes(b"x")
    link = tmp_path / "pack"
    link.mkdir()
    (link / "intelligent_vram").symlink_to(ROOT, target_is_directory=True)
    names = [*OUTSIDE, str(tmp_path / "base" / "secret.safetensors"), "known.safetensors"]
    script = ASK.format(root=str(host.root), pack=str(link), launcher=str(LAUNCHER), base=str(tmp_path / "base"))
    ran = subprocess.run(
        [host.python, "-c", script], input=json.dumps(names), capture_output=True, text=True, timeout=300, cwd=host.root
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = json.loads(ran.stdout.splitlines()[-1])
    assert len(answers) == 2 * len(names)
    for name, path in answers:
        if name == "known.safetensors":
            assert Path(path) == models / name
        else:
            assert path is None or Path(path).resolve().parent == models, f"{name!r} leads to {path}"
