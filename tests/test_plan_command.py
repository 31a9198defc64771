"""``intelligent-vram plan``: what it prints, and how it ends. The models are sparse files of 28 GB and small ones."""

import json
import re
import subprocess
import sys

import pytest
import torch
from intelligent_vram.cli.main import main
from intelligent_vram.cli.wan import WAN_14B, WanConfig, meta_model
from intelligent_vram.vram.units import GIB
from PIL import Image

from .engine.test_model_facts import KNOWN, shapes, write_sparse

CARD = ["--device", "RTX 4090", "--ram", "64"]
UNITS = {"MiB": 1 << 20, "GiB": GIB}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def write(name, tensors):
        return str(write_sparse(folder / f"{name}.safetensors", tensors))

    def wan(config):
        return {name: tensor.to(torch.bfloat16) for name, tensor in meta_model(config).state_dict().items()}

    big = write("wan", wan(WAN_14B))
    cut_off = folder / "cut_off.safetensors"
    with open(big, "rb") as whole:
        cut_off.write_bytes(whole.read(500_000))
    return {
        "wan": big,
        "cut off": str(cut_off),
        "tiny": write("tiny", wan(WanConfig(dim=256, ffn_dim=640, num_heads=2, num_layers=5, text_dim=96))),
        "flux": write("flux", shapes(**KNOWN["Flux"][0])),
        "sd3": write("sd3", shapes(**KNOWN["SD3"][0])),
        "unknown": write("unknown", shapes(**{f"blocks/{i}/w/weight": (64, 64) for i in range(3)})),
    }


@pytest.fixture
def plan(files, capsys):
    """Runs the command on a file: its exit status, output and errors."""

    def call(name, *options):
        try:
            status = main(["plan", files[name], *options])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def numbers(plan):
    """Runs the command with --json: what it prints."""

    def call(*options, name="wan"):
        status, out, err = plan(name, *CARD, "--json", *options)
        assert (status, err) == (0, "")
        return json.loads(out)

    return call


def test_the_command_prints_a_plan_and_its_exit_status_says_how_it_ended(files):
    def start(*options):
        command = [sys.executable, "-W", "ignore", "-m", "intelligent_vram.cli.main", "plan", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    runs = [
        start(files["wan"], *CARD, "--json"),
        start(files["wan"], *CARD, "--vram", "2"),
        start(files["cut off"], *CARD),
    ]
    (fits, _), (small, small_error), (broken, broken_error) = (run.communicate(timeout=120) for run in runs)
    assert [run.returncode for run in runs] == [0, 1, 2]
    assert json.loads(fits)["device"] == "RTX 4090"
    assert (small, broken) == ("", "")
    assert re.fullmatch(
        r"intelligent-vram plan: 2\.00 GiB of VRAM do not hold .*: [\d.]+ GiB are needed.*\n", small_error
    )
    assert broken_error.startswith(f"intelligent-vram plan: {files['cut off']}: ")
    assert "cut off" in broken_error.removeprefix(f"intelligent-vram plan: {files['cut off']}")
    assert broken_error.count("\n") == 1


def test_the_text_says_what_is_there_what_was_chosen_and_what_it_will_do(plan):
    status, out, err = plan("wan", *CARD, "--vram", "16")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "device: RTX 4090, not in this machine, compute capability 8.9"
    assert any(line.startswith("RAM: 64.00 GiB, 64.00 GiB available") for line in lines)
    assert any(
        line.startswith("Model: Wan 2.1/2.2 text-to-video 14B, 40 blocks, bf16; 26.6")
        and line.endswith("32,760 tokens in ComfyUI")
        for line in lines
    )
    assert any(line.startswith("Chosen: limit 16.00 GiB, adaptive") for line in lines)
    said = next(line for line in lines if line.startswith("Prediction: "))
    sizes = [float(n) * UNITS[unit] for n, unit in re.findall(r"([\d.]+) (MiB|GiB)", said.split(";")[0])]
    assert sizes[1] == 16 * GIB
    assert sizes[0] <= sizes[1]
    assert sizes[0] == pytest.approx(sum(sizes[2:]), abs=0.03 * GIB)
    assert not any(line.startswith("Note") for line in lines)


def test_the_numbers_add_up(numbers):
    result = numbers("--vram", "10")
    found = result["prediction"]
    assert result["limit"] == 10 * GIB
    assert found["peak"] == sum(found[use] for use in ("resident", "slots", "beside", "activations", "context"))
    assert found["peak"] <= result["limit"]
    assert found["seconds"] >= found["floor"] * (1 - 1e-9)
    assert found["floor"] >= found["compute"] > 0
    assert sum(result["model"]["bytes_by_dtype"].values()) == result["model"]["bytes"]
    assert result["model"]["bytes_in_blocks"] < result["model"]["bytes"]
    assert result["model"]["bytes"] <= found["ram"] + found["beside"] <= 1.001 * result["model"]["bytes"]
    assert result["model"]["blocks"] == {"blocks": 40}
    assert 0 < found["streamed_units"] < found["units"]
    assert result["host_budget"] <= result["usable_ram"] == int(0.8 * 64 * GIB)


def test_more_vram_streams_less_and_a_smaller_video_takes_less(numbers):
    tight, wide = numbers("--vram", "8"), numbers("--vram", "20")
    assert wide["prediction"]["streamed"] < tight["prediction"]["streamed"]
    assert tight["tokens"] == 21 * 30 * 52
    picture = numbers("--vram", "8", "--size", "832X480")
    assert picture["tokens"] == 30 * 52
    assert picture["prediction"]["activations"] < tight["prediction"]["activations"] / 5
    assert picture["prediction"]["compute"] < tight["prediction"]["compute"] / 10
    assert numbers("--size", "416x240x41")["tokens"] == 11 * 15 * 26


def test_the_numbers_of_a_card_can_be_given(numbers):
    usual = numbers("--vram", "8", "--size", "512x512")
    slow = numbers("--vram", "8", "--size", "512x512", "--bandwidth", "5")
    assert slow["link"] == 5e9
    assert slow["prediction"]["seconds"] > 3 * usual["prediction"]["seconds"]
    weak = numbers("--vram", "8", "--throughput", "20")
    assert weak["prediction"]["compute"] > 2 * numbers("--vram", "8")["prediction"]["compute"]
    assert numbers("--card-vram", "48")["device_total"] == 48 * GIB
    assert numbers("--preset", "memory optimized")["limit"] == int(0.4 * usual["device_total"])


def test_the_host_is_the_one_that_was_named(numbers):
    comfy, wanvideo = numbers("--vram", "12"), numbers("--vram", "12", "--host", "WanVideoWrapper")
    assert (comfy["host"], wanvideo["host"]) == ("ComfyUI", "WanVideoWrapper")
    for result in (comfy, wanvideo):
        assert result["prediction"]["ram"] <= 1.001 * result["model"]["bytes_in_blocks"]
    assert wanvideo["prediction"]["activations"] < comfy["prediction"]["activations"]  # its own constants
    assert wanvideo["prediction"]["compute"] != comfy["prediction"]["compute"]


def test_too_little_ram_is_said_with_how_much_is_missing(plan):
    status, out, _ = plan("wan", "--device", "RTX 4090", "--ram", "16", "--vram", "16")
    assert status == 0
    arena = float(re.search(r"^RAM: ([\d.]+) GiB for the weights", out, re.MULTILINE)[1])
    missing = float(re.search(r"^Note: RAM is too small by ([\d.]+) GiB", out, re.MULTILINE)[1])
    assert missing == pytest.approx(arena - 16, abs=0.011)


def test_the_picture_can_be_read(plan, tmp_path):
    path = tmp_path / "plan.png"
    assert plan("wan", *CARD, "--vram", "12", "--png", str(path))[0] == 0
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 600
        assert image.height >= 200
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5
    other = tmp_path / "other.png"
    assert plan("wan", *CARD, "--vram", "20", "--png", str(other))[0] == 0
    assert path.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("place", ["missing/plan.png", "plan.nothing"])
def test_a_picture_that_cannot_be_written_is_said_so(plan, tmp_path, place):
    status, _, err = plan("tiny", *CARD, "--png", str(tmp_path / place))
    assert status == 2
    assert str(tmp_path / place) in err


def test_the_cpu_is_measured(plan):
    status, out, err = plan("tiny", "--device", "cpu", "--size", "64x64", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["tokens"] == 16
    assert result["prediction"]["context"] == 0
    assert result["prediction"]["peak"] <= result["limit"]


@pytest.mark.parametrize(
    ("device", "like"),
    [("RTX 4900", "RTX 4090"), ("RTX 3080 Tii", "RTX 3080 Ti"), ("Voodoo 2", "RTX 2060 to RTX 5090")],
)
def test_an_unknown_card_is_refused_with_those_that_are_like_it(plan, device, like):
    status, out, err = plan("tiny", "--device", device)
    assert (status, out) == (2, "")
    assert f"'{device}' is not in the table" in err
    assert like in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vram", "0"], "0 is no size in GiB"),
        (["--vram", "-4"], "-4 is no size in GiB"),
        (["--vram", "nan"], "nan is no size in GiB"),
        (["--ram", "much"], "--ram"),
        (["--size", "832"], "832 is not like 832x480x81"),
        (["--size", "-832x-480x81"], "--size"),
        (["--size", "8x8"], "less than one token"),
        (["--size", "832x480x0"], "less than one token"),
        (["--bandwidth", "-5"], "above 0"),
        (["--bandwidth", "0"], "above 0"),
        (["--throughput", "nan"], "above 0"),
        (["--throughput", "0"], "above 0"),
        (["--host", "Forge"], "ComfyUI"),
        (["--preset", "best"], "standard"),
        (["--device", "cuda:99"], "cuda:99|CUDA|GPU"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(plan, options, words):
    device = [] if "--device" in options else CARD
    status, out, err = plan("tiny", *device, *options)
    assert (status, out) == (2, "")
    assert re.search(words, err)


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "nothing.safetensors"), *CARD]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_model_of_an_unknown_family_is_not_predicted_and_says_so(plan, tmp_path):
    status, out, _ = plan("unknown", *CARD, "--size", "64x64")
    assert status == 0
    assert "Note: Unknown family" in out
    assert "Prediction:" not in out
    picture = tmp_path / "plan.png"
    _, out, err = plan("unknown", *CARD, "--png", str(picture))
    assert picture.exists() or "picture" in out + err  # nothing is ignored in silence


def test_a_known_family_without_known_blocks_is_refused(plan):
    status, out, err = plan("sd3", *CARD, "--size", "1024x1024")
    assert (status, out) == (1, "")
    assert err.startswith("intelligent-vram plan: ")


def test_a_model_that_the_wrapper_does_not_know_is_refused_there(plan):
    status, out, err = plan("flux", *CARD, "--host", "WanVideoWrapper")
    assert (status, out) == (1, "")
    assert err.startswith("intelligent-vram plan: ")


def test_an_image_model_makes_an_image_by_default(plan):
    status, out, _ = plan("flux", *CARD, "--json")
    assert status == 0
    assert json.loads(out)["tokens"] == 52 * 30
