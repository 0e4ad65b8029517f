"""A few steps on the CPU: the losses are finite, a killed run goes on, and the checkpoint loads with the plain Auto classes."""

import importlib
import math
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tiny_training import llava_next, qwen3_vl
from tiny_training.bundled import bundled
from tiny_training.evaluation import exact_match
from tiny_training.loop import Settings, Trainer

CPU = torch.device("cpu")
TEXT = {"hidden": 32, "layers": 6, "heads": 4, "kv_heads": 4, "head_dim": 16, "feed_forward": 48}
FAMILIES = {
    "llava_next": (llava_next, "forward", "tile_pages", TEXT | {"vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 64}),
    "qwen3_vl": (qwen3_vl, "forward_qwen3_vl", "patch_pages",
                 TEXT | {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_feed_forward": 48, "deepstack": (0, 1)}),
}  # fmt: skip


def make_trainer(name, settings, seed=0):
    family, module, prepare, geometry = FAMILIES[name]
    forwards = importlib.import_module(f"tiny_training.{module}")
    model = family.build_model(family.build_config(**geometry), seed=seed)
    return Trainer(model, forwards.BatchedForward(model), getattr(forwards, prepare), family.TOKENS, settings, CPU)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_train_resume_save_evaluate(name, tmp_path):
    family = FAMILIES[name][0]
    settings = Settings(
        seconds=600, work=tmp_path / "work", pages_per_step=2, length=64, workers=0, compile_layers=False, max_steps=2, log_every=0.0,
        look_away=1.0, routed=0.5, route_at=0.0, route_ramp=1e-3, curriculum_until=0.0,
    )  # fmt: skip
    trainer = make_trainer(name, settings)
    trainer.run(time.monotonic())
    assert trainer.step == 2 and 0 < trainer.route_from < 600  # route_at=0: from the first report on

    resumed = make_trainer(name, replace(settings, max_steps=3), seed=1)
    resumed.resume()
    assert resumed.stream.name != trainer.stream.name  # other documents than at the beginning
    assert (resumed.step, resumed.route_from, resumed.log) == (2, trainer.route_from, trainer.log)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True))
    resumed.run(time.monotonic())
    assert resumed.step == 3 and len(resumed.log) == 3
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["auxiliary"]) and 0 < row["looking"] < 6.75 for row in resumed.log)
    assert set(bundled.SKILLS) < set(resumed.log[0])
    resumed.write_log(tmp_path / "work" / "training_log.csv")
    assert len((tmp_path / "work" / "training_log.csv").read_text().splitlines()) == 4

    folder = tmp_path / "checkpoint"
    trained = {key: tensor.detach().clone() for key, tensor in resumed.model.named_parameters()}
    resumed.model.config.get_text_config()._attn_implementation = "sdpa"
    family.save_checkpoint(resumed.model, folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, trained[key].bfloat16()) for key, tensor in loaded.named_parameters())
    result = exact_match(folder, family.build_processor(), 2, CPU, batch_size=2)
    assert set(result) == {"all", *bundled.SKILLS[:2]} and 0.0 <= result["all"] <= 1.0


@pytest.mark.parametrize("name", list(FAMILIES))
def test_assigned_reading_blocks_text_only_and_only_in_its_share(name, tmp_path, pack):
    trainer = make_trainer(name, Settings(seconds=1, work=tmp_path, workers=0, compile_layers=False, look_away=1.0, rest_from=4))
    batch = pack(FAMILIES[name][0].TOKENS, 3, 2, length=64)
    others, weights, reading = trainer._reading(batch, 1.0)
    before = others.shape[2] - 64
    assert float(weights.sum()) == pytest.approx(1.5) and not weights[:, :before].any()
    assert len(reading) == 6 and before == {"llava_next": 1 + 521 * 2, "qwen3_vl": 1 + 403 * 2}[name]
    own = trainer.router.assigned[batch.slot].permute(2, 0, 1, 3)
    for layer, told in enumerate(reading):
        assert torch.equal(told["blocked"][:, before:], ~own[layer]) and not told["blocked"][:, :before].any()
        assert int(told["visual"].sum()) == {"llava_next": 1040, "qwen3_vl": 800}[name] and told["visual"][:1].sum() == 0
    assert not any(told["blocked"].any() for told in trainer._reading(batch, 0.0)[2])
    # what is told reaches the attention function, and makes a difference there
    pixels = trainer.prepare(trainer.renderer.draw(batch.cells.flatten(0, 1)))
    arguments = pixels, 2, batch.tokens, batch.answer, batch.cells
    with torch.no_grad():
        free, routed = (trainer.forward.losses(*arguments, trainer._reading(batch, share)[2]) for share in (0.0, 1.0))
    assert len(free.masses) == len(routed.masses) == 6 and float(free.answer) != float(routed.answer)
    assert all(mass[other].max() == 0.0 for mass, other in zip(routed.masses, others, strict=True))  # as many KV heads as heads
    plain = make_trainer(name, Settings(seconds=1, work=tmp_path, workers=0, compile_layers=False))
    assert plain._reading(batch, 1.0) == (None, None, [])
    with torch.no_grad():
        assert float(plain.forward.losses(*arguments).answer) == pytest.approx(float(free.answer), abs=1e-4)


def test_schedules(tmp_path):
    settings = Settings(seconds=100, work=tmp_path, routed=0.4)
    assert settings.rate(10_000, 0.5) == settings.peak_rate
    assert settings.rate(10_000, 1.0) == 0.0
    assert settings.rate(0, 0.0) < settings.peak_rate / 100
    assert [settings.strength(since) for since in (-math.inf, -1.0, 0.0, 30.0, 60.0, 600.0)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert settings.routed_share(1.0, 0.5) == 0.4 and settings.routed_share(0.5, 0.8) == pytest.approx(0.2)
    never = replace(settings, constant_until=1.0, unroute_from=1.0, route_ramp=0.0)
    assert never.rate(10_000, 0.99) == settings.peak_rate and never.routed_share(never.strength(1.0), 0.99) == 0.4
    assert settings.routed_share(1.0, 0.9) == pytest.approx(0.2) and settings.routed_share(1.0, 1.0) == 0.0


@pytest.mark.parametrize("family", [llava_next, qwen3_vl])
def test_the_shipped_geometry_fits(family):
    with torch.device("meta"):
        model = family.build_model(family.build_config())
    assert 16_000_000 < 2 * sum(parameter.numel() for parameter in model.parameters()) < 19_900_000  # bf16; the rest: files beside it
