"""The script that made the demo models: it goes on where it was stopped, and its captions fit its tokenizers."""

from __future__ import annotations

import json
import random

import pytest
import torch
import train
import training
from conftest import ROOT
from scenes import caption, random_scene
from transformers import CLIPTokenizer, T5TokenizerFast


def weights(folder, monkeypatch, stage: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    steps = iter(range(100))
    difference = train.__dict__["difference"]

    def maybe_stop(y, x):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return difference(y, x)

    with monkeypatch.context() as patch:
        patch.setattr(training, "PICTURES", 8)
        patch.setattr(training, "MORE_PICTURES", 12)
        patch.setattr(train, "UNSEEN", range(2))
        patch.setattr(train, "difference", maybe_stop)
        make = train.train_vae if stage == "vae-sdxl" else train.train_decoder
        make(stage, training.Plan(steps=4, batch=2, lr=1e-3), folder, torch.device("cpu"))
    return torch.load(folder / f"{stage}.pt", weights_only=True)["average"]


@pytest.mark.parametrize("stage", ["vae-sdxl", "decoder-sdxl-more"])  # the second has two optimizers
def test_training_goes_on_from_its_checkpoint(stage, tmp_path, monkeypatch):
    """Stopped after two of four steps and started again, it ends with the weights of a run that was left alone."""
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        if stage != "vae-sdxl":
            before = weights(folder, monkeypatch, "vae-sdxl")
            torch.save({"average": before}, folder / "vae-sdxl-more.pt")
    whole = weights(tmp_path / "whole", monkeypatch, stage)
    with pytest.raises(SystemExit, match="stopped at step 2 of 4"):
        weights(tmp_path / "stopped", monkeypatch, stage, stop_at=2)
    resumed = weights(tmp_path / "stopped", monkeypatch, stage)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-7)


def test_what_the_saved_pipelines_hold_is_recovered(tmp_path):
    """Recovered and saved again, a pipeline is the one that it was: file by file, but for version numbers."""
    train.main(["--stages", "recover", "--work", str(tmp_path)])
    train.main(["--stages", "save-sdxl", "save-flux", "--work", str(tmp_path), "--out", str(tmp_path)])
    for family in ("sdxl", "flux"):
        files = sorted(path.relative_to(train.HERE / family) for path in (train.HERE / family).rglob("*.safetensors"))
        assert len(files) == 4
        for file in files:
            assert (tmp_path / family / file).read_bytes() == (train.HERE / family / file).read_bytes(), file
        config = "vae/config.json"
        kept, made = (json.loads((root / family / config).read_text()) for root in (train.HERE, tmp_path))
        assert {k: kept[k] for k in kept if k[0] != "_"} == {k: made[k] for k in made if k[0] != "_"}


@pytest.mark.parametrize(
    "stages, there, message",
    [
        (["distil"], [], "vae-flux.pt is missing: run the stage vae-flux before distil"),
        (["distil"], ["vae-flux"], "flux.pt is missing: run the stage flux before distil"),
        (["vae-sdxl", "decoder-flux"], [], "vae-flux.pt is missing: run the stage vae-flux before decoder-flux"),
        (["sdxl", "vae-sdxl"], [], "vae-sdxl.pt is missing: run the stage vae-sdxl before sdxl"),
        (["flux-more"], ["vae-flux-more", "flux"], "distil.pt is missing: run the stage distil before flux-more"),
        (["save-flux"], ["vae-flux", "flux", "decoder-flux"], "distil.pt is missing: run the stage distil before save"),
    ],
)
def test_a_missing_checkpoint_is_reported_at_once(tmp_path, stages, there, message):
    """And not after 16,000 drawings and the stages before it."""
    for stage in there:
        (tmp_path / f"{stage}.pt").touch()
    train.check_stages(train.STAGES, tmp_path)  # in their order each finds what those before it make
    with pytest.raises(SystemExit, match=message):
        train.main(["--stages", *stages, "--work", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt" for stage in there}


def test_a_device_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--device", "foo"])
    assert "argument --device: Expected one of cpu, cuda" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("folder, kind", [("sdxl/tokenizer", CLIPTokenizer), ("flux/tokenizer_2", T5TokenizerFast)])
def test_captions_fit_the_tokenizers(folder, kind):
    """No caption is longer than T5's 32 tokens in training or CLIP's 77, and no word of one is unknown."""
    tokenizer = kind.from_pretrained(ROOT / "demo" / folder)
    texts = [caption(random_scene(random.Random(i)), random.Random(i)) for i in range(500)]
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= (train.CAPTION_TOKENS if kind is T5TokenizerFast else 77)
    if kind is T5TokenizerFast:
        assert not any(tokenizer.unk_token_id in row for row in ids)
