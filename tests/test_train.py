"""The script that made the demo models: it goes on where it was stopped, and its captions fit its tokenizers."""

from __future__ import annotations

import random

import pytest
import torch
import train
from conftest import ROOT
from scenes import PLACES, SUBJECTS, Scene, caption, draw, random_scene, sheet
from transformers import CLIPTokenizer, T5TokenizerFast


def weights(folder, monkeypatch, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    steps = iter(range(100))
    difference = train.__dict__["difference"]

    def maybe_stop(y, x):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return difference(y, x)

    with monkeypatch.context() as patch:
        patch.setattr(train, "PICTURES", 8)
        patch.setitem(train.PLAN, "vae-sdxl", (4, 2, 1e-3))
        patch.setattr(train, "difference", maybe_stop)
        train.train_vae("vae-sdxl", folder, torch.device("cpu"))
    return torch.load(folder / "vae-sdxl.pt", weights_only=True)["average"]


def test_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Stopped after two of four steps and started again, it ends with the weights of a run that was left alone."""
    whole = weights(tmp_path / "whole", monkeypatch)
    with pytest.raises(SystemExit, match="stopped at step 2 of 4"):
        weights(tmp_path / "stopped", monkeypatch, stop_at=2)
    resumed = weights(tmp_path / "stopped", monkeypatch)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "stages, there, message",
    [
        (["distil"], [], "vae-flux.pt is missing: run the stage vae-flux before distil"),
        (["distil"], ["vae-flux"], "flux.pt is missing: run the stage flux before distil"),
        (["vae-sdxl", "decoder-flux"], [], "vae-flux.pt is missing: run the stage vae-flux before decoder-flux"),
        (["sdxl", "vae-sdxl"], [], "vae-sdxl.pt is missing: run the stage vae-sdxl before sdxl"),
        (["save"], ["vae-sdxl", "vae-flux", "sdxl", "flux", "decoder-sdxl", "decoder-flux"], "distil.pt is missing"),
    ],
)
def test_a_missing_checkpoint_is_said_at_once(tmp_path, stages, there, message):
    """And not after 16,000 drawings and the stages before it."""
    for stage in there:
        (tmp_path / f"{stage}.pt").touch()
    with pytest.raises(SystemExit, match=message):
        train.main(["--stages", *stages, "--work", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt" for stage in there}


def test_stages_find_what_those_before_them_make(tmp_path):
    train.check_stages(train.STAGES, tmp_path)
    train.check_stages(["vae-flux", "flux", "distil"], tmp_path)


def test_a_device_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--device", "foo"])
    assert "argument --device: Expected one of cpu, cuda" in capsys.readouterr().err.splitlines()[-1]


def test_drawings_depend_on_their_scene_alone():
    scenes = [random_scene(random.Random(i)) for i in range(3)]
    assert all(draw(scene).tobytes() == draw(scene).tobytes() for scene in scenes)
    assert sheet().size == (len(SUBJECTS) * 128, len(PLACES) * 128)


@pytest.mark.parametrize("folder, kind", [("sdxl/tokenizer", CLIPTokenizer), ("flux/tokenizer_2", T5TokenizerFast)])
def test_captions_fit_the_tokenizers(folder, kind):
    """No caption is longer than T5's 32 tokens in training or CLIP's 77, and no word of one is unknown."""
    tokenizer = kind.from_pretrained(ROOT / "demo" / folder)
    texts = [caption(random_scene(random.Random(i)), random.Random(i)) for i in range(500)]
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= (train.CAPTION_TOKENS if kind is T5TokenizerFast else 77)
    if kind is T5TokenizerFast:
        assert not any(tokenizer.unk_token_id in row for row in ids)


def test_full_captions_name_the_scene():
    rng = random.Random(0)
    for subject, words in SUBJECTS.items():
        scene = Scene(subject, "jungle", "cold", "muted")
        text = caption(scene, rng, partial=0).lower()
        assert any(word in text for word in words) and any(place in text for place in PLACES["jungle"])
