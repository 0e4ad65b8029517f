"""The bundled M-RoPE model from alias to answers: loaded without torchvision, compiled, equal to itself with all directions kept."""

import importlib.util

import pytest
import torch

from rotatek_compile import CompileOptions, compile_artifact, models
from rotatek_compile.answer import answer_once
from rotatek_compile.artifact import read_artifact
from rotatek_compile.calibration_data.bundled import BundledSet
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.enable import enable

DOCUMENTS = {4: (1, "field"), 5: (2, "missing")}  # of `forms`: pages and skill; the dense model answers both


@pytest.fixture(scope="module")
def loaded():
    source = models.resolve("tiny-qwen3-vl")
    return models.load_model(source, torch.float32, torch.device("cpu")), models.load_processor(source)


@pytest.fixture(scope="module")
def dense(loaded):
    """Dense answers with their samples."""
    samples = [BundledSet("forms", "evaluation").sample(number) for number in DOCUMENTS]
    return [(sample, answer_once(*loaded, list(sample.images), sample.question, 24, stream=False)) for sample in samples]


def test_answers_without_torchvision(loaded, dense):
    torchvision = importlib.util.find_spec("torchvision") is not None
    assert ("video_processor" in loaded[1].get_attributes()) == torchvision
    for (sample, answer), (pages, skill) in zip(dense, DOCUMENTS.values(), strict=True):
        assert (len(sample.images), sample.skill) == (pages, skill)
        assert (answer.text,) == sample.answers


def test_all_directions_kept_change_nothing(loaded, dense, tmp_path):
    target = tmp_path / "artifact"
    small = {"num_samples": 4, "batch_size": 2, "keep_ratio": 1.0, "device": "cpu", "quiet": True}
    small["sensitivity_samples"] = 1  # the plan keeps everything, whatever the sensitivities: save the time
    compile_artifact(CompileOptions(model="tiny-qwen3-vl", calib="forms", output=target, **small))
    artifact = read_artifact(target)
    assert artifact.plan() == {layer: [HeadPlan(Slabs(128), Slabs(128))] * 4 for layer in range(5)}
    for sample, reference in dense:
        with enable(loaded[0], artifact):
            answer = answer_once(*loaded, list(sample.images), sample.question, 24, stream=False)
        assert (answer.text, answer.new_tokens) == (reference.text, reference.new_tokens)
        assert answer.bytes.stored > answer.bytes.dense  # through the compressed cache: blocks are padded
