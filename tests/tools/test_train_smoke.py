"""A few steps on the CPU: the losses are finite, a killed run goes on, and the checkpoint loads with the plain Auto classes."""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tiny_training import llava_next  # noqa: E402
from tiny_training.evaluation import exact_match  # noqa: E402
from tiny_training.loop import Settings, Trainer  # noqa: E402

SMALL = {
    "hidden": 32, "layers": 2, "head_dim": 16, "feed_forward": 48, "vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 64,
}  # fmt: skip


def test_train_resume_save_evaluate(tmp_path):
    device = torch.device("cpu")
    settings = Settings(seconds=600, work=tmp_path / "work", pages_per_step=3, turns=2, compile_layers=False, max_steps=2)
    trainer = Trainer(llava_next.build_model(llava_next.build_config(**SMALL)), settings, device)
    trainer.run(time.monotonic())

    resumed = Trainer(llava_next.build_model(llava_next.build_config(**SMALL), seed=1), replace(settings, max_steps=3), device)
    resumed.resume()
    assert resumed.step == 2
    resumed.run(time.monotonic())
    assert resumed.step == 3
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["auxiliary"]) for row in resumed.log)
    resumed.write_log(tmp_path / "work" / "training_log.csv")
    assert len((tmp_path / "work" / "training_log.csv").read_text().splitlines()) == 1 + len(resumed.log)

    folder = tmp_path / "checkpoint"
    trained = {name: tensor.detach().clone() for name, tensor in resumed.model.named_parameters()}
    llava_next.save_checkpoint(resumed.model, folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, trained[name].bfloat16()) for name, tensor in loaded.named_parameters())
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    assert 0.0 <= exact_match(folder, 2, device, batch_size=2)["all"] <= 1.0


def test_schedule_ends_at_zero_and_curriculum_at_full_pages(tmp_path):
    settings = Settings(seconds=100, work=tmp_path)
    assert settings.rate(10_000, 0.5) == settings.peak_rate
    assert settings.rate(10_000, 1.0) == 0.0
    assert settings.rate(0, 0.0) < settings.peak_rate / 100
    assert settings.stage(0.0) == ((1.0, 0.0, 0.0), (2, 3))
    assert settings.stage(0.5) == ((1.0, 1.0, 1.0), (4, 20))


def test_the_shipped_geometry_fits():
    model = llava_next.build_model(llava_next.build_config())
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 < 19_000_000
