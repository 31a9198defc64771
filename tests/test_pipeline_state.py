"""What users of release, releasing, share and ReleasingPipeline rely on, with diffusers' own modular pipelines."""

import copy
import gc
import logging
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from intelligent_vram.vram import held
from intelligent_vram.vram.pipeline_state import (
    LARGE_NAMES,
    ReleasingPipeline,
    needed_by,
    release,
    releasing,
    share,
)

from .tiny_pipeline import DecodeWith, calls, modular, pipeline

MIB = 1 << 20
KEEP = ("kv_cache",)


def live():
    """Bytes of all tensors that Python knows."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), torch.Tensor):
            used = held.storage(tensor)
            if used is not None:
                found[used[0]] = used[1]
    return sum(found.values())


def state_of(**values):
    """diffusers' state with these values."""
    return modular.PipelineState(values=values)


# -- over many calls -------------------------------------------------------------------------------------------------------


def test_memory_after_call_30_is_that_after_call_3_and_without_release_it_grows_by_a_frame_a_call():
    sizes = {}
    for name, pipe in (("release", ReleasingPipeline(pipeline(), keep=KEEP)), ("none", pipeline())):
        sizes[name] = []
        state = None
        for number in range(30):
            state = pipe(state=state, block_idx=number)
            if number + 1 in (3, 30):
                sizes[name].append(live())
        frame = state.get("videos")[-1].nbytes
        del state
    assert sizes["release"][1] == sizes["release"][0]
    assert sizes["none"][1] - sizes["none"][0] == 27 * frame


def test_frames_are_the_same_with_and_without_release():
    expected = calls(pipeline(), 30)
    for options in ({"keep": KEEP}, {"keep": KEEP, "share": False}, {"names": (), "larger_than": MIB, "keep": KEEP}):
        released = calls(ReleasingPipeline(pipeline(), **options), 30)
        assert all(torch.equal(a, b) for a, b in zip(released, expected, strict=True))
    assert not torch.equal(expected[28], expected[29])


def test_a_cache_that_is_not_kept_changes_what_is_made_and_is_named_once(caplog):
    expected = calls(pipeline(), 4)
    pipe = ReleasingPipeline(pipeline())
    frames = calls(pipe, 4)
    assert torch.equal(frames[0], expected[0])
    assert not torch.equal(frames[3], expected[3])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "kv_cache" in warning
    assert "keep" in warning


def test_names_that_were_given_are_released_without_a_warning(caplog):
    calls(ReleasingPipeline(pipeline(), names=("videos", "decoder_cache")), 4)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_pipeline_says_what_it_released_and_how_much_in_all():
    pipe = ReleasingPipeline(pipeline(), keep=KEEP)
    assert pipe.released is None
    frames = calls(pipe, 3)
    frame = frames[0].nbytes
    assert pipe.released.names == {"videos": frame, "decoder_cache": 3 * frame}
    assert pipe.released.kept == {"kv_cache": 8 * 256 * 4 * 64 * 4}
    assert pipe.released_bytes == 8 * frame
    assert pipe.released.describe() == (
        "released 3.0 MiB: videos 768.0 KiB, decoder_cache 2.2 MiB; kept as declared: kv_cache 2.0 MiB"
    )


def test_a_call_copies_nothing_large_and_the_state_stays_diffusers_own():
    pipe = ReleasingPipeline(pipeline(), keep=KEEP)
    state = pipe(state=None)
    cache = state.get("kv_cache")[0]["k"]
    again = pipe(state=state, block_idx=1)
    assert isinstance(again, modular.PipelineState)
    assert again.get("kv_cache")[0]["k"] is cache
    assert again.get("kv_cache") is not state.get("kv_cache")
    assert copy.deepcopy(again).get("kv_cache")[0]["k"] is cache


def test_only_some_of_the_outputs_may_be_asked_for():
    pipe = ReleasingPipeline(pipeline(), keep=KEEP)
    state = pipe()
    assert len(pipe(state=state, block_idx=1, output="videos")) == 1
    assert len(state.get("kv_cache")) == 4


def test_required_inputs_are_never_touched():
    pipe = pipeline(DecodeWith)
    assert needed_by(pipe) == {"colour"}
    releasing_pipe = ReleasingPipeline(pipe, names=("videos", "colour"))
    state = releasing_pipe(colour=torch.ones(3))
    again = releasing_pipe(state=state, block_idx=1)
    assert torch.equal(again.get("colour"), torch.ones(3))
    assert releasing_pipe.released.kept == {"colour": 12}
    assert len(again.get("videos")) == 1


def test_the_pipelines_own_attributes_are_there():
    pipe = pipeline()
    wrapped = ReleasingPipeline(pipe)
    assert wrapped.blocks.input_names == pipe.blocks.input_names
    assert not hasattr(wrapped, "nothing_of_that_name")
    assert copy.copy(wrapped).pipe is pipe


def test_lists_of_names_by_kind_do_not_grow():
    pipe = ReleasingPipeline(pipeline(), keep=KEEP)
    state = None
    for number in range(5):
        state = pipe(state=state, block_idx=number)
    assert len(state.kwargs_mapping["indices"]) <= 2
    state.set("videos", torch.zeros(2), "indices")
    release(state)
    assert state.get_by_kwargs("indices") == {"block_idx": 4}


def test_any_callable_with_a_state_is_released_and_a_dict_is_the_callers_own():
    def step(state, number):
        state["videos"] = [*state.get("videos", ()), torch.full((10,), float(number))]
        state["latents"] = torch.ones(5) * number
        return state["videos"][-1]

    state = {}
    pipe = ReleasingPipeline(step)
    assert [pipe(state, number)[0].item() for number in range(4)] == [0, 1, 2, 3]
    assert len(state["videos"]) == 1
    assert pipe.released_bytes == 3 * 40


# -- one release -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, state_of])
def test_named_values_go_and_others_stay(make):
    state = make(
        **{name: torch.zeros(100) for name in LARGE_NAMES}, latents=torch.zeros(7), prompt="a boat", empty=None
    )
    released = release(state)
    assert {*(state if isinstance(state, dict) else state.values)} == {"latents", "prompt", "empty"}
    assert released.names == dict.fromkeys(LARGE_NAMES, 400)
    assert released.nbytes == 2000
    assert released.by_device == {"cpu": 2000}
    assert release(state).describe() == "nothing to release"


def test_values_are_released_by_size_and_weights_are_not_counted():
    state = {"a": [torch.zeros(1000)], "b": torch.zeros(10), "vae": torch.nn.Linear(100, 100), "n": 5}
    assert release(state, names=(), larger_than=100).names == {"a": 4000}
    assert {*state} == {"b", "vae", "n"}
    assert release(state, names=(), larger_than=0).names == {"b": 40}


def test_memory_that_the_state_still_holds_is_not_counted_as_released():
    frames = torch.zeros(1000)
    state = {"videos": [frames[:10]], "latents": frames[5:], "decoder_cache": frames}
    assert release(state).names == {"videos": 0, "decoder_cache": 0}
    weight = torch.nn.Linear(10, 10)
    assert release({"videos": weight.weight, "vae": weight}).names == {"videos": 0}


def test_memory_that_two_released_values_share_is_counted_once():
    frames = torch.zeros(1000)
    assert release({"videos": [frames[:10], frames], "decoder_cache": {"a": frames}}).nbytes == 4000


def test_what_a_view_is_cut_from_and_arrays_and_objects_are_counted():
    class Cache:
        __slots__ = ("keys",)

        def __init__(self):
            self.keys = [torch.zeros(100)]

    assert release({"videos": torch.zeros(1000)[:1]}).nbytes == 4000
    assert release({"videos": numpy.zeros((4, 250), numpy.float32)[1:]}).nbytes == 4000
    assert release({"videos": [Cache()]}).nbytes == 400
    loop = [torch.zeros(1)]
    loop.append(loop)
    assert release({"videos": loop}).nbytes == 4


def test_declared_keys_stay_whatever_names_them():
    state = {"kv_cache": torch.zeros(100), "big": torch.zeros(100)}
    released = release(state, larger_than=10, keep=("kv_cache", "big"))
    assert released.kept == {"kv_cache": 400, "big": 400}
    assert released.names == {}
    assert {*state} == {"kv_cache", "big"}


def test_inside_the_block_the_state_is_whole_and_afterwards_nothing_large_is_left_even_after_an_exception():
    state = {"videos": torch.zeros(100), "latents": torch.zeros(1)}

    def run():
        with releasing(state) as released:
            assert released[0].nbytes == 400
            assert "videos" not in state
            state["videos"] = torch.zeros(50)
            steps.append(released)
            raise RuntimeError("out of memory")

    steps = []
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert steps[0][1].nbytes == 200
    assert {*state} == {"latents"}


@pytest.mark.parametrize("state", [3, None, "videos", [torch.zeros(1)], torch.nn.Linear(1, 1)])
def test_what_is_no_state_is_refused_in_words(state):
    with pytest.raises(TypeError, match=f"{type(state).__name__} is no pipeline state"):
        release(state)
    with pytest.raises(TypeError, match="is no pipeline state"):
        share(state)


def test_a_name_in_place_of_names_and_a_negative_size_are_refused():
    with pytest.raises(TypeError, match="'videos' is one name"):
        release({}, names="videos")
    with pytest.raises(TypeError, match="'latents' is one name"):
        ReleasingPipeline(pipeline(), keep="latents")
    with pytest.raises(ValueError, match="not negative"):
        release({}, larger_than=-1)


# -- copies ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, state_of])
def test_a_copy_shares_tensors_arrays_and_modules_and_copies_all_else(make):
    values = {
        "videos": [torch.zeros(3)],
        "array": numpy.zeros(3),
        "vae": torch.nn.Linear(2, 2),
        "generator": torch.Generator().manual_seed(1),
        "settings": {"steps": [1, 2]},
    }
    state = share(make(**values))
    copied = copy.deepcopy(state)
    found = copied if make is dict else copied.values
    assert type(copied) is type(state)
    assert isinstance(copied, make if make is dict else modular.PipelineState)
    assert found["videos"] is not values["videos"]
    assert found["videos"][0] is values["videos"][0]
    assert found["array"] is values["array"]
    assert found["vae"] is values["vae"]
    assert found["generator"] is not values["generator"]
    assert found["settings"] == values["settings"]
    assert found["settings"]["steps"] is not values["settings"]["steps"]


def test_a_shared_state_is_the_same_state():
    state = state_of(a=1)
    shared = share(state)
    shared.set("b", 2)
    assert state.get("b") == 2
    assert share(shared) is shared
    assert shared.b == 2


def test_values_that_hold_each_other_do_so_in_the_copy():
    one, other = [1], {"n": 2}
    one.append(other)
    state = share(state_of(one=one, other=other))
    copied = copy.deepcopy(state)
    assert copied.get("one")[1] is copied.get("other")
    assert copied.get("other") is not other


def test_what_cannot_be_copied_is_shared_with_one_warning_that_names_it(caplog):
    lock = threading.Lock()
    inner = [1]
    gradient = torch.zeros(2, requires_grad=True) * 2
    state = share(state_of(lock=[inner, lock], frames=(i for i in range(3)), inner=inner, gradient=gradient, n=[5]))
    for _ in range(3):
        state = copy.deepcopy(state)
    assert state.get("lock")[1] is lock
    assert state.get("gradient") is gradient
    assert state.get("inner") == [1]
    (record,) = caplog.records
    assert "lock (list), frames (generator)" in record.getMessage()
    assert "gradient" not in record.getMessage()


def test_a_pipeline_whose_state_cannot_be_copied_runs():
    pipe = ReleasingPipeline(pipeline(), keep=KEEP)
    state = pipe()
    state.set("lock", threading.Lock())
    assert torch.equal(pipe(state=state, block_idx=1).get("videos")[-1], calls(pipeline(), 2, seed=0)[1])
    with pytest.raises(TypeError, match="pickle"):
        pipe.pipe(state=modular.PipelineState(values={"lock": threading.Lock()}))


def test_the_backend_does_not_import_diffusers():
    code = "import sys, intelligent_vram.vram.pipeline_state; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
