"""What users of the demonstration model and of the timeline picture rely on."""

import weakref
from collections import Counter

import pytest
import torch
from intelligent_vram.cli import timeline, wan
from intelligent_vram.cli.timeline import Interval
from PIL import Image
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = wan.WanConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=3, text_dim=32, text_len=8)

LINEAR = ("weight", "bias")
ATTENTION = [f"{layer}.{part}" for layer in "qkvo" for part in LINEAR] + ["norm_q.weight", "norm_k.weight"]
BLOCK = {
    "modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in ATTENTION),
}  # fmt: skip
OUTSIDE = {
    f"{layer}.{part}"
    for layer in ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
                  "time_projection.1", "head.head")
    for part in LINEAR
} | {"head.modulation"}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return wan.random_model(TINY, torch.float32, seed=1)


def inputs(tokens=60, dtype=torch.float32):
    return wan.sample_inputs(TINY, tokens, dtype, seed=2)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every tensor made inside, as long as its storage lives."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in given:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_parameters_have_the_names_of_the_published_checkpoints(model):
    blocks = {f"blocks.{index}.{name}" for index in range(TINY.num_layers) for name in BLOCK}
    assert set(model.state_dict()) == OUTSIDE | blocks


def test_a_block_of_the_14b_model_has_702_8_mb_in_bf16():
    with torch.device("meta"):
        block = wan.WanAttentionBlock(wan.WAN_14B)
    assert 2 * sum(p.numel() for p in block.parameters()) == pytest.approx(702.8e6, rel=1e-4)


def test_the_small_model_fits_a_demo_on_a_cpu():
    config = wan.WanConfig.small()
    nbytes = 2 * sum(p.numel() for p in wan.meta_model(config).parameters())
    assert 150e6 < nbytes < 250e6
    assert config.num_layers == 16


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 100 does not split into 3 heads"):
        wan.WanConfig(dim=100, ffn_dim=200, num_heads=3, num_layers=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_gives_a_finite_prediction_of_the_latents_shape_and_dtype(dtype):
    latent, timestep, text = inputs(dtype=dtype)
    result = wan.random_model(TINY, dtype)(latent, timestep, text)
    assert result.shape == latent.shape
    assert result.dtype == dtype
    assert result.isfinite().all()


def test_two_forwards_of_the_same_input_are_equal_and_leave_the_input_alone(model):
    arguments = inputs()
    before = [argument.clone() for argument in arguments]
    assert torch.equal(model(*arguments), model(*arguments))
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


def test_time_text_and_place_all_matter(model):
    latent, timestep, text = inputs()
    result = model(latent, timestep, text)
    assert not torch.allclose(result, model(latent, timestep + 100, text), atol=1e-3)
    assert not torch.allclose(result, model(latent, timestep, text.flip(2)), atol=1e-3)
    mirrored = model(latent.flip(-1).contiguous(), timestep, text)
    assert not torch.allclose(result, mirrored.flip(-1), atol=1e-3)


def test_working_on_fewer_tokens_at_once_changes_nothing(model, monkeypatch):
    arguments = inputs()
    expected = model(*arguments)
    monkeypatch.setattr(wan, "TOKENS_AT_ONCE", 7)
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_each_item_of_a_batch_is_computed_as_if_alone(model):
    latent, timestep, text = inputs()
    both = model(torch.cat([latent, latent * 2]), torch.cat([timestep, timestep / 2]), torch.cat([text, text * 2]))
    torch.testing.assert_close(both[:1], model(latent, timestep, text), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], model(latent * 2, timestep / 2, text * 2), rtol=1e-4, atol=1e-4)


def test_rotary_embedding_turns_pairs_by_the_position_on_their_axis():
    rope = wan.rope_table((2, 3, 4), 48, torch.device("cpu")).view(2, 3, 4, 24)
    torch.testing.assert_close(rope[1, 2, 3, :8], rope[1, 0, 0, :8])
    torch.testing.assert_close(rope[1, 2, 3, 8:16], rope[0, 2, 0, 8:16])
    torch.testing.assert_close(rope[1, 2, 3, 16:], rope[0, 0, 3, 16:])
    angles = 3 * 10_000 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(rope[0, 0, 3, 16:], torch.polar(torch.ones(8), angles))


def test_hooks_see_every_layer_with_weights_once_a_forward(model):
    calls = Counter()
    layers = [name for name, layer in model.named_modules() if "weight" in dict(layer.named_parameters(recurse=False))]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
        for name in layers
    ]
    model(*inputs())
    for handle in handles:
        handle.remove()
    assert calls == Counter(layers)


def test_at_most_five_full_size_activations_are_alive(monkeypatch):
    monkeypatch.setattr(wan, "TOKENS_AT_ONCE", 64)
    config = wan.WanConfig(dim=128, ffn_dim=345, num_heads=8, num_layers=2, text_dim=32, text_len=8)
    model = wan.random_model(config, torch.bfloat16)
    arguments = wan.sample_inputs(config, 2048, torch.bfloat16)
    with LiveMemory() as memory:
        model(*arguments)
    full_size = 2048 * 128 * 2
    assert 4.5 * full_size < memory.peak < 5.5 * full_size  # 5, the rotations (a quarter of one here), and trifles


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(1024, (4, 32, 32)), (7800, (5, 60, 104)), (32760, (21, 60, 104)), (60, (1, 12, 20)), (7, (1, 2, 14))],
)
def test_a_latent_has_exactly_the_tokens_asked_for(tokens, shape):
    frames, height, width = wan.latent_shape_for_tokens(tokens)
    assert (frames, height, width) == shape
    assert frames * (height // 2) * (width // 2) == tokens


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        wan.latent_shape_for_tokens(0)


def test_latents_that_patches_do_not_divide_and_texts_that_are_too_long_are_refused(model):
    latent, timestep, text = inputs()
    with pytest.raises(ValueError, match="does not split into patches"):
        model(latent[..., :-1], timestep, text)
    with pytest.raises(ValueError, match="text has 16 tokens, more than 8"):
        model(latent, timestep, torch.cat([text, text], dim=1))


def test_short_text_counts_as_padded_with_zeros(model):
    latent, timestep, text = inputs()
    text[:, 5:] = 0
    assert torch.equal(model(latent, timestep, text), model(latent, timestep, text[:, :5]))


def test_random_weights_follow_the_seed_and_differ_between_layers(model):
    same, other = wan.random_model(TINY, torch.float32, seed=1), wan.random_model(TINY, torch.float32, seed=3)
    weight = model.blocks[0].self_attn.q.weight
    assert torch.equal(weight, same.blocks[0].self_attn.q.weight)
    assert not torch.equal(weight, other.blocks[0].self_attn.q.weight)
    assert not torch.equal(weight, model.blocks[0].self_attn.k.weight)
    assert not torch.equal(weight, model.blocks[1].self_attn.q.weight)
    assert weight.std() == pytest.approx(96**-0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_checkpoint_loads_as_the_random_model_of_its_seed(tmp_path, dtype):
    path = tmp_path / "tiny.safetensors"
    wan.write_checkpoint(TINY, path, dtype, seed=5)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded, expected = wan.load_checkpoint(path, TINY).state_dict(), wan.random_model(TINY, dtype, seed=5).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_a_checkpoint_of_another_depth_is_refused_with_the_names_that_do_not_fit(tmp_path):
    wan.write_checkpoint(TINY, tmp_path / "tiny.safetensors", torch.bfloat16)
    deeper = wan.WanConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=4, text_dim=32, text_len=8)
    with pytest.raises(RuntimeError, match=r"blocks\.3\.modulation"):
        wan.load_checkpoint(tmp_path / "tiny.safetensors", deeper)


def test_a_dtype_that_random_weights_cannot_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        wan.write_checkpoint(TINY, tmp_path / "tiny.safetensors", torch.float8_e4m3fn)
    assert not list(tmp_path.iterdir())


def colours(path):
    with Image.open(path) as image:
        return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in image.convert("RGB").getcolors(1 << 24)}


def sequence(count, length, gap=0.0, start=0.0):
    return [
        Interval(f"block {index}", start + index * (length + gap), start + index * (length + gap) + length)
        for index in range(count)
    ]


def test_stalls_are_the_gaps_of_the_compute_lane_from_the_origin_on():
    computes = [Interval("c", 5.0, 6.0), Interval("a", 1.0, 3.0), Interval("b", 2.0, 2.5)]
    assert [(stall.start, stall.end) for stall in timeline.find_stalls(computes, 0.0)] == [(0.0, 1.0), (3.0, 5.0)]


def test_the_time_between_two_kernel_launches_is_no_stall():
    assert timeline.find_stalls(sequence(5, 1e-3, gap=5e-6), 0.0) == []


@pytest.mark.parametrize(("span", "step"), [(171, 20), (0.9, 0.1), (14, 1), (14.1, 2), (3093, 500), (1e-4, 1e-5)])
def test_ticks_stand_at_round_numbers(span, step):
    assert timeline.nice_step(span, 14) == pytest.approx(step)


def test_a_timeline_shows_copies_computes_and_stalls_in_their_colours(tmp_path):
    path = tmp_path / "timeline.png"
    copies, computes = sequence(12, 0.013), sequence(12, 0.011, gap=0.002, start=0.013)
    timeline.draw_timeline(copies, computes, path, title="Title", footer="Footer")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1600, 420)
    expected = {*timeline.COPY_SHADES, *timeline.COMPUTE_SHADES, timeline.STALL, timeline.STALL_GROUND}
    assert expected <= colours(path)
    assert timeline.MEMORY not in colours(path)


def test_memory_gets_a_lane_of_its_own(tmp_path):
    path = tmp_path / "timeline.png"
    memory = [(0.0, 2 << 30), (0.01, 5 << 30), (0.02, 3 << 30)]
    timeline.draw_timeline([], sequence(3, 0.01), path, title="Title", limit_bytes=4 << 30, memory=memory)
    with Image.open(path) as image:
        assert image.size == (1600, 556)
    assert {timeline.MEMORY, timeline.MEMORY_GROUND} <= colours(path)


@pytest.mark.parametrize(
    ("copies", "computes"),
    [
        ([], []),
        ([], sequence(1, 0.0)),
        (sequence(1, 1e-6), []),
        (sequence(2000, 3e-4), sequence(2000, 2e-4, gap=1e-4)),
        (sequence(3, 40.0), sequence(3, 40.0, start=1e6)),
    ],
    ids=["nothing", "one moment", "one microsecond", "2000 intervals", "far apart"],
)
def test_any_number_of_intervals_can_be_drawn(tmp_path, copies, computes):
    timeline.draw_timeline(copies, computes, tmp_path / "timeline.png", title="word " * 100, footer="word " * 200)
    assert (tmp_path / "timeline.png").stat().st_size > 1000
