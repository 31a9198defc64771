"""``intelligent-vram demo``: what README's first command promises, on the CPU."""

import json

import pytest
from intelligent_vram.cli.main import main
from PIL import Image

SMALL = ["demo", "--device", "cpu", "--layers", "3", "--tokens", "64"]


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise", "layerwise"])
def test_one_json_object_says_identical_and_within_the_limit(mode, tmp_path, capsys):
    picture = tmp_path / "timeline.png"
    assert main([*SMALL, "--mode", mode, "--json", "--png", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical"] is True
    assert 0 < result["peak_bytes"] <= result["limit_bytes"]
    assert result["forward_seconds"] > 0
    assert result["floor_seconds"] > 0
    assert result["streamed_bytes"] > 0
    assert result["device"] == "CPU"
    with Image.open(picture) as image:
        assert image.size == (1600, 420)


def test_the_text_says_the_same_in_words(tmp_path, capsys):
    assert main([*SMALL, "--png", str(tmp_path / "timeline.png")]) == 0
    text = capsys.readouterr().out
    assert "equal to the resident forward to the bit" in text
    assert "within the limit" in text


def test_a_limit_that_cannot_do_is_refused_with_one_that_can(tmp_path, capsys):
    assert main([*SMALL, "--vram", "0.0001", "--png", str(tmp_path / "timeline.png")]) == 2
    assert "smallest limit" in capsys.readouterr().err
