"""What is usual among calibration documents, in an artifact: measured, written, read strictly, and used by the cache."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from artifact_edits import edit_config, edit_tensors, put, refused, with_entry
from PIL import Image, ImageDraw

from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.api import load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.batches import encode, end_ids
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.runtime.enable import enable
from rotatek_compile.usual import FACTOR, FEWEST

RATIO, CODES, ANGLE = "layers.1.visual.value_tail_ratio", "layers.0.visual.key_code_ratio", "layers.2.visual.value_angle"


@pytest.fixture
def knowing(broken_artifact):
    """A copy of an artifact of few documents that was taught what is usual, and that a test may damage."""

    def add(tensors):
        for i in range(3):
            for side in ("key", "value"):
                tensors[f"layers.{i}.visual.{side}_tail_ratio"] = torch.linspace(1, 3, 32).repeat(2, 1)
                tensors[f"layers.{i}.visual.{side}_code_ratio"] = torch.ones(2, 32)
            tensors[f"layers.{i}.visual.value_angle"] = torch.tensor([[20.0, 2.0], [0.0, 0.1]])

    edit_tensors(broken_artifact, add)
    edit_config(broken_artifact, lambda config: config["rotatek"].update(usual_deviation=2.5, fallback_factor=2.0))
    return broken_artifact


def test_it_is_read(knowing):
    artifact = read_artifact(knowing)
    assert torch.equal(artifact.tensors[RATIO], torch.linspace(1, 3, 32).repeat(2, 1))
    assert artifact.tensors[ANGLE].tolist() == [[20.0, 2.0], [0.0, pytest.approx(0.1)]]
    assert (artifact.method.usual_deviation, artifact.method.fallback_factor) == (2.5, 2.0)


def test_an_artifact_of_few_documents_has_none(compiled):
    artifact = read_artifact(compiled)
    assert not any(name.endswith(("_ratio", "_angle")) for name in artifact.tensors)
    assert (artifact.method.usual_deviation, artifact.method.fallback_factor) == (None, 8.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(RATIO, with_entry((1, 3), 0.5)), f"tensor {RATIO} holds 0.5, allowed are 1 to 1e+09"),
        (put(RATIO, with_entry((1, 3), 1e10)), f"tensor {RATIO} holds 1e+10, allowed are 1 to 1e+09"),
        (put(CODES, with_entry((1, 3), 0.99)), f"tensor {CODES} holds 0.99, allowed are 1 to 1e+09"),
        (lambda tensors: tensors.pop(CODES), f"tensor {CODES} is missing"),
        (put(RATIO, with_entry((0, 0), float("nan"))), f"tensor {RATIO} holds NaN or infinity"),
        (put(RATIO, lambda t: t[:, :31]), f"tensor {RATIO} has shape [2, 31], the geometry wants [2, 32]"),
        (put(RATIO, torch.Tensor.double), f"tensor {RATIO} is float64, expected float32"),
        (lambda tensors: tensors.pop(RATIO), f"tensor {RATIO} is missing"),
        (put(ANGLE, with_entry((1, 0), -1.0)), f"tensor {ANGLE} holds -1 to 20 and 0.1 to 2, expected degrees up to 90"),
        (put(ANGLE, with_entry((0, 0), 91.0)), f"tensor {ANGLE} holds 0 to 91"),
        (put(ANGLE, with_entry((0, 1), 0.0)), f"tensor {ANGLE} holds 0 to 20 and 0 to 0.1"),
        (put(ANGLE, with_entry((0, 1), float("inf"))), f"tensor {ANGLE} holds NaN or infinity"),
        (put(ANGLE, lambda t: t.flatten()), f"tensor {ANGLE} has shape [4], the geometry wants [2, 2]"),
        (lambda tensors: tensors.pop(ANGLE), f"tensor {ANGLE} is missing"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("_angle")],
            "usual_deviation is 2.5, but no tensor holds the angles it is of",
        ),
    ],
)
def test_damaged_tensors(knowing, change, words):
    edit_tensors(knowing, change)
    said = refused(knowing)
    assert words in said and said.endswith("; compile the artifact again")


@pytest.mark.parametrize("value", [0, -1, 2.5, "2", True, None, 1 << 40])
def test_damaged_length(knowing, value):
    edit_config(knowing, lambda config: config["rotatek"].update(image_tokens=value))
    assert "image_tokens is " in refused(knowing)


@pytest.mark.parametrize("value", [0, -1, "2", True, 1e300, [2]])
def test_damaged_bound(knowing, value):
    edit_config(knowing, lambda config: config["rotatek"].update(usual_deviation=value))
    assert "usual_deviation is " in refused(knowing)


def page(number):
    """Black strokes on white, somewhere else on every page."""
    random = np.random.default_rng(number)
    picture = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(picture)
    for x, y in random.integers(0, 80, (12, 2)).tolist():
        draw.rectangle((x, y, x + int(random.integers(4, 14)), y + 3), fill="black")
    return picture


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory, moments_cache):
    """Compiled on twelve pages."""
    folder = tmp_path_factory.mktemp("usual")
    for n in range(12):
        page(n).save(folder / f"{n}.png")
    rows = [{"question": f"What is {n}?", "answers": [f"word {n}"], "images": [f"{n}.png"]} for n in range(12)]
    data, target = folder / "pages.jsonl", folder / "artifact"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"num_samples": 12, "batch_size": 3, "device": "cpu", "quiet": True, "keep_ratio": 0.25, "value_bits": "4"}
    compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data), output=target, **small))
    return read_artifact(target)


@pytest.fixture(scope="module")
def bundle(artifact):
    return load_base(artifact, model=None, dtype=None, device="cpu")


def encoded(model, processor, artifact, picture):
    """Read as documents are when compiling: the same text before the image."""
    return encode(
        processor, Sample(id="new", question="What is 3?", answers=("word",), images=(picture,)), artifact.geometry, end_ids(model)[0]
    )


@pytest.fixture(scope="module")
def read(artifact, bundle):
    """What the cache of one picture says, and the warnings."""
    model, processor = bundle

    def one(picture, artifact=artifact):
        item = encoded(model, processor, artifact, picture)
        inputs = {"input_ids": torch.tensor([item.prompt]), **item.media}
        with torch.no_grad(), enable(model, artifact, backend="torch") as active, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            cache = active.new_cache()
            model(**inputs, past_key_values=cache, use_cache=True)
        return cache.stats() | {"said": [str(one.message) for one in said if "unlike the documents" in str(one.message)]}

    return one


def test_it_is_measured_when_compiling(artifact, bundle):
    text = encoded(*bundle, artifact, page(0)).prompt
    assert artifact.method.image_tokens == sum(text.count(token) for token in artifact.geometry.visual_token_ids) > 8
    assert artifact.method.fallback_factor == FACTOR and artifact.method.usual_deviation > 1.0
    for i in range(3):
        for side in ("key", "value"):
            ratio = artifact.tensors[f"layers.{i}.visual.{side}_tail_ratio"]
            assert ratio.shape == (2, 32) and (ratio >= 1).all() and (ratio[:, :24] < 10).all() and (ratio > 1).any()
        angle = artifact.tensors[f"layers.{i}.visual.value_angle"]
        assert angle.shape == (2, 2) and (angle[:, 0] < 45).all() and (angle[:, 1] > 0).all()
    assert artifact.calibration["num_samples"] > FEWEST


def test_pages_like_the_calibration_pass_and_others_do_not(artifact, read):
    """What was read for calibration is usual by definition, new pages of the kind are; noise is not, and nobody saw that before."""
    for n in (*range(12), 100, 101, 102):
        stats = read(page(n))
        assert (stats["fallback_heads"], stats["unlike_calibration"], stats["said"]) == (0, False, []), (n, stats["deviation"])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    stats = read(noise)
    assert stats["fallback_heads"] > 0 and stats["unlike_calibration"] and len(stats["said"]) == 1
    assert stats["deviation"] > artifact.method.usual_deviation
    before = {name: tensor for name, tensor in artifact.tensors.items() if not name.endswith(("_ratio", "_angle"))}
    old = replace(artifact, tensors=before, method=replace(artifact.method, usual_deviation=None, fallback_factor=8.0))
    before = read(noise, old)
    assert before["fallback_heads"] < stats["fallback_heads"] / 2 and not before["unlike_calibration"] and before["said"] == []


def test_an_evaluation_says_it_once(artifact, bundle):
    """Of two batches of noise, not of pages like the calibration's."""
    model, processor = bundle
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (96, 96, 3), dtype=np.uint8)) for n in range(2)]
    for pictures, times in (([page(50), page(51)], 0), (noise, 1)):
        evaluator = Evaluator(model, processor, "after", end_ids(model), 2)
        with enable(model, artifact, backend="torch") as active, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            methods = {"dense": evaluator.dense_cache, "artifact": active.new_cache, "again": active.new_cache}
            evaluate(evaluator, [encoded(model, processor, artifact, picture) for picture in pictures], methods, 1)
        assert sum("unlike the documents" in str(one.message) for one in said) == times
