"""What users of the growth watch rely on: it says whether memory grows, which tensors, what holds them, and disturbs nothing."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.cli.main import main
from intelligent_vram.vram import growth as growth_module
from intelligent_vram.vram.device import NoDevice
from intelligent_vram.vram.growth import LIVE, RAM, Growth, GrowthWatch, grows, signed
from intelligent_vram.vram.growth_picture import draw_growth
from intelligent_vram.vram.growth_scan import DEPTH, holders, scan
from PIL import Image

MIB = 1 << 20
KEPT = []


@pytest.fixture(autouse=True)
def clean() -> None:
    """What earlier tests left to the garbage collector would go, or look different, in the middle of a test."""
    gc.collect()


class Pipe:
    """Keeps every frame, and a cache of each."""

    def __init__(self):
        self.videos = []
        self.state = {"decoder_cache": []}

    def step(self):
        self.videos.append(torch.zeros(3, 256, 512))
        self.state["decoder_cache"].append({"k": torch.zeros(100, 256)})


def watched(step, marks=8, **options):
    """The growth over so many calls of ``step``."""
    with GrowthWatch("cpu", **options) as watch:
        for _ in range(marks):
            step()
            watch.mark()
        return watch.growth()


def counter(growth, name):
    """One of its counters."""
    (found,) = [found for found in growth.counters if found.name == name]
    return found


# -- whether it grows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1, 2], None),
        ([1, 2, 3], True),
        ([5, 5, 5, 5, 5, 5], False),
        ([1, 1, 1, 9, 9, 9], False),  # once
        ([1, 5, 2, 6, 1, 5, 2, 6, 1], False),  # up and down
        ([1, 9, 2, 9, 3, 9, 4, 9, 5], True),  # more and more under what comes and goes
        ([9, 8, 7, 6, 5, 4], False),
        ([1, 1, 1, 2, 2, 2, 3, 3, 3], True),  # in steps, as reserved memory does
        ([1, 2, 4, 5, 5, 5, 5, 5, 5], False),  # a cache that became full
    ],
)
def test_what_grows_once_or_up_and_down_does_not_grow(values, verdict):
    assert grows(values) is verdict


@given(st.lists(st.integers(0, 1 << 40), min_size=3, max_size=40), st.integers(1, 1 << 20))
def test_growth_by_more_than_it_varies_is_found_and_its_reverse_is_not(noise, step):
    spread = max(noise) - min(noise) + step
    rising = [value + index * spread for index, value in enumerate(noise)]
    assert grows(rising, step) is True
    assert grows(rising[::-1], step) is False


def test_a_pipeline_that_keeps_its_frames_is_found_with_what_holds_them():
    pipe = Pipe()
    growth = watched(pipe.step)
    assert growth.grows is True
    assert counter(growth, LIVE).per_mark == pytest.approx(1.5 * MIB + 102400)
    assert len(growth.kinds) == 2, growth.kinds
    frames, cache = growth.kinds
    assert (frames.count, frames.nbytes, frames.holders) == (6, 6 * 3 * MIB // 2, ("Pipe.videos[*]",))
    assert (cache.count, cache.nbytes, cache.holders) == (6, 6 * 102400, ("Pipe.state['decoder_cache'][*]['k']",))
    assert growth.report()[0].startswith("Memory grows: Live tensors")
    assert any(
        line == "Grown: 9.0 MiB in +6 tensors [3, 256, 512] float32 on cpu, held by Pipe.videos[*]"
        for line in growth.report()
    )


def test_work_that_keeps_nothing_does_not_grow_and_is_not_looked_at_again():
    growth = watched(lambda: torch.zeros(3, 256, 512).sum(), marks=12, always=False)
    assert growth.grows is False
    assert growth.kinds == ()
    assert growth.verdict() == "No growth over 11 runs"
    assert sum(mark.scanned for mark in growth.marks) <= 4


def test_what_the_first_runs_load_does_not_count():
    loaded = []

    def step():
        if len(loaded) < 2:
            loaded.append(torch.zeros(MIB))

    assert watched(step, warm_up=2).grows is False
    assert watched(step, warm_up=2).kinds == ()


def test_too_few_marks_say_nothing():
    for marks in range(4):
        growth = watched(lambda: None, marks=marks)
        assert growth.grows is None
        assert "Too few runs" in growth.report()[0]
    assert GrowthWatch("cpu", unit="frame").growth().report()[0].startswith("Too few frames")


def test_memory_that_is_no_tensor_counts_as_ram():
    kept = []
    growth = watched(lambda: kept.append(b"x" * (33 * MIB)), marks=7)  # never from memory that it has
    assert counter(growth, RAM).grows is True
    assert counter(growth, LIVE).grows is False
    assert growth.verdict() == "Memory grows: RAM of this process"


def test_small_tensors_are_found():
    kept = []
    growth = watched(lambda: kept.append(torch.zeros(10)))
    assert counter(growth, LIVE).grows is True
    assert growth.kinds[0].count == 6


def test_views_count_with_all_that_they_are_cut_from_and_once():
    kept = []

    def step():
        frame = torch.zeros(1000, 1024)
        kept.append((frame[0], frame[1:3]))

    growth = watched(step, marks=5)
    assert sum(kind.nbytes for kind in growth.kinds) == 3 * 1000 * 1024 * 4


def test_the_watch_keeps_nothing_alive():
    pipe = Pipe()
    growth = watched(pipe.step)
    frames = [weakref.ref(frame) for frame in pipe.videos]
    del pipe
    gc.collect()
    assert all(frame() is None for frame in frames)
    assert growth.kinds


def test_the_watch_itself_does_not_grow(monkeypatch):
    monkeypatch.setattr(growth_module, "MOST_MARKS", 20)
    watch = GrowthWatch("cpu", always=False)
    for _ in range(200):
        watch.mark()
        assert len(watch.marks) <= 20
    numbers = [mark.number for mark in watch.marks]
    assert numbers[:2] == [0, 1]
    assert numbers[-1] == 199
    assert numbers == sorted(numbers)
    assert watch.count == 200


@pytest.mark.parametrize("device", ["cuda:99", "cuda", "mps"])
def test_a_device_that_is_not_there_is_named(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(NoDevice, match=r"cuda|CUDA|mps"):
        GrowthWatch(device)


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="warm_up is -1"):
        GrowthWatch("cpu", warm_up=-1)


# -- what holds it -----------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("frame",)


class Shared:
    frame = None


def test_holders_are_named():
    made = [torch.zeros(1) for _ in range(9)]
    KEPT.append(made[0])
    pipe = Pipe()
    pipe.state["deep"] = {"a": ({"b": made[1]},)}
    slotted = Slotted()
    slotted.frame = made[2]
    Shared.frame = made[3]
    local = [made[4]]

    def closure(frame=made[5]):
        return held_by_closure

    held_by_closure = {"frame": made[6]}

    def generate(frame):
        yield frame

    generator = generate(made[7])
    next(generator)
    targets, made = made, None
    try:
        names = holders(targets)
    finally:
        KEPT.clear()
        Shared.frame = None
    assert names[0] == f"{__name__}.KEPT[*]"
    assert names[1] == "Pipe.state['deep']['a'][*]['b']"
    assert names[2] == "Slotted.frame"
    assert names[3] == "Shared.frame"
    assert names[4] == "(local)[*]"
    assert names[5].startswith("(defaults of ")
    assert names[6].startswith("(closure of ")
    assert names[6].endswith(".closure)['frame']")
    assert names[7].endswith("generate)")
    assert names[8] is None
    del local, closure, pipe, slotted


def test_containers_that_hold_each_other_or_lie_deep_end():
    frame = torch.zeros(1)
    loop = [frame]
    loop.append(loop)
    deep = torch.zeros(1)
    nested = deep
    for _ in range(3 * DEPTH):
        nested = [nested]
    names = holders([frame, deep])
    assert names[0].endswith("[*]")
    assert names[1].count("[*]") <= DEPTH


def test_odd_tensors_are_passed_over():
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(1000)
    odd = [fake, torch.zeros(1000, device="meta"), torch.zeros(100, 100).to_sparse()]
    before = scan()
    assert not any(kind.shape == (1000,) for kind in before.kinds)
    assert len(odd) == 3


def test_lines_that_allocate_are_named_on_request():
    pipe = Pipe()
    growth = watched(pipe.step, where=True)
    assert all(
        site.startswith("tests/test_growth.py:") and site.endswith(" in step")
        for kind in growth.kinds
        for site in kind.sites
    )
    assert [len(kind.sites) for kind in growth.kinds] == [1, 1]
    assert all(kind.sites == () for kind in watched(Pipe().step).kinds)


def test_lines_are_those_of_the_first_allocation_and_of_living_tensors():
    kept = []

    def step():
        kept.append(torch.zeros(MIB))
        kept[-1].add_(1)
        torch.ones(MIB)

    (kind,) = watched(step, where=True).kinds
    assert kind.sites == (f"tests/test_growth.py:{step.__code__.co_firstlineno + 1} in step",)


# -- report and picture ------------------------------------------------------------------------------------------------------


def test_changes_have_a_sign():
    assert signed(3 * MIB) == "+3.0 MiB"
    assert signed(-3 * MIB) == "-3.0 MiB"
    assert signed(0) == "+0 B"


def test_plain_values_are_json():
    growth = watched(Pipe().step)
    values = json.loads(json.dumps(growth.as_json()))
    assert values["grows"] is True
    assert values["grown"][0]["kind"] == {"shape": [3, 256, 512], "dtype": "float32", "device": "cpu"}
    assert len(values["marks"]) == 8


@pytest.mark.parametrize("marks", [0, 1, 2, 8, 150])
@pytest.mark.parametrize("leak", [False, True])
def test_the_picture_has_one_size_whatever_it_shows(marks, leak):
    step = (lambda: KEPT.append(torch.zeros(300))) if leak else (lambda: None)
    try:
        growth = watched(step, marks=marks, always=False)
        image = draw_growth(growth, title="x" * 300)
    finally:
        KEPT.clear()
    assert image.size == ((1400, 1070) if marks > 1 else (1400, image.height))
    assert len(set(image.convert("L").tobytes())) > 8


def test_a_card_has_lanes_for_its_counters(monkeypatch):
    growth = watched(Pipe().step)
    card = Growth(
        "cuda:0",
        "frame",
        growth.marks,
        1,
        (*growth.counters, *growth.counters),
        growth.kinds,
        5 * MIB,
    )
    assert draw_growth(card, title="Two more lanes").height > draw_growth(growth, title="").height


# -- the command -------------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
import beside
videos = []

def run():
    print("running")
    videos.append(torch.zeros(3, 256, 512))
    return videos[-1]

def flat():
    return torch.zeros(1000, 1000)

def broken():
    raise RuntimeError("no weights")

def ends():
    raise SystemExit(3)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "leaky_script.py"
    path.write_text(SCRIPT)
    return path


def test_the_command_tells_a_script_that_grows_from_one_that_does_not(script, tmp_path, capsys):
    picture = tmp_path / "growth.png"
    assert main(["growth", str(script), "--runs", "6", "--where", "--device", "cpu", "--png", str(picture)]) == 1
    output = capsys.readouterr().out
    assert "Memory grows: Live tensors" in output
    assert "held by leaky_script.videos[*], made at" in output
    assert "leaky_script.py:8 in run" in output
    with Image.open(picture) as image:
        assert image.width == 1400
    assert main(["growth", str(script), "--runs", "6", "--function", "flat", "--device", "cpu"]) == 0
    assert "No growth over 5 runs" in capsys.readouterr().out


def test_json_is_all_that_is_printed(script, capsys):
    assert main(["growth", str(script), "--json", "--device", "cpu"]) == 1
    assert json.loads(capsys.readouterr().out)["counters"][0]["per_mark"] == 3 * MIB / 2


def test_the_command_leaves_no_trace(script, capsys):
    path, arguments, modules = sys.path[:], sys.argv[:], set(sys.modules)
    main(["growth", str(script), "--device", "cpu", "--runs", "4"])
    assert (sys.path, sys.argv) == (path, arguments)
    assert "leaky_script" not in set(sys.modules) - modules


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--function", "broken"], "the run ended with RuntimeError: no weights"),
        (["--function", "ends"], "the run ended with SystemExit: 3"),
        (["--function", "walk"], "has no function walk"),
        (["--function", "videos"], "has no function videos"),
        (["--runs", "3"], "3 runs with 1 to warm up are too few"),
        (["--warm-up", "-1"], "too few"),
        (["--device", "cuda:99"], "cuda"),
        (["--png", "no/such/folder/growth.png"], "no/such/folder/growth.png"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(script, arguments, reason, capsys):
    assert main(["growth", str(script), "--device", "cpu", *arguments]) == 2
    assert reason.lower() in capsys.readouterr().err.strip().splitlines()[-1].lower()


@pytest.mark.parametrize("name", ["nothing_here.py", "no.such.module", "folder"])
def test_a_script_that_is_not_there_is_said_in_a_line(name, capsys):
    assert main(["growth", name, "--device", "cpu"]) == 2
    assert f"{name} cannot be loaded" in capsys.readouterr().err


def test_a_script_that_does_not_parse_is_said_in_a_line(tmp_path, capsys):
    path = tmp_path / "wrong.py"
    path.write_text("def run(:\n")
    assert main(["growth", str(path), "--device", "cpu"]) == 2
    assert "cannot be loaded: SyntaxError" in capsys.readouterr().err


def test_modules_are_run_by_name(script):
    command = [sys.executable, "-m", "intelligent_vram.cli.main", "growth", "leaky_script", "--function", "flat"]
    result = subprocess.run(
        [*command, "--device", "cpu"], cwd=script.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
