"""What is usual among calibration documents decides when heads fall back, and when a page is said to be unlike them."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from rotatek_compile.coding_error import ROUNDING
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.encode import choose
from rotatek_compile.runtime.monitor import Monitor, deviation_of
from rotatek_compile.runtime.observed import Rules, observe
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.recording import record
from rotatek_compile.runtime.rounding_error import SLACK, usual_ratios
from rotatek_compile.runtime.store import Store
from rotatek_compile.runtime.text_blocks import TextBlocks, Writing

DIM, HEADS, LAYERS = 32, 2, 3
RAW = Slabs(DIM)
UNLIKE = "unlike the documents that the artifact was calibrated on"


def test_usual_ratios():
    spectrum, tails = torch.tensor([[8.0, 4.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.5, 3.0, 7.0]])
    codes = 10 * tails
    assert usual_ratios(spectrum, [Slabs(2)], tails, codes) == [3.0]
    assert usual_ratios(spectrum, [Slabs(0)], tails, codes) == [1.0]
    assert usual_ratios(spectrum, [Slabs(4)], tails, codes) == [1.0]  # nothing is discarded
    assert usual_ratios(spectrum, [Slabs(1, 0, 3)], tails, codes) == pytest.approx([15.0])
    eight, four = ROUNDING[8] * 8, ROUNDING[4] * 6
    expected = (1.0 * eight + 15.0 * four + 7.0 * 1) / (eight + four + 1)
    assert usual_ratios(spectrum, [Slabs(0, 1, 2)], tails, codes) == pytest.approx([expected])
    assert usual_ratios(spectrum, [Slabs(0, 1, 2)], None, None) == [1.0]


@pytest.fixture
def side_of(make_artifact):
    """`SideBasis` of the Keys of layer 0 for a plan of two heads, with a tail ratio everywhere or none."""

    def make(slabs, ratio=None):
        artifact = make_artifact(plan={i: [HeadPlan(one, RAW) for one in slabs] for i in range(LAYERS)})
        if ratio is not None:
            for name in ("tail_ratio", "code_ratio"):
                artifact.tensors[f"layers.0.visual.key_{name}"] = torch.tensor(ratio).unsqueeze(1).expand(HEADS, DIM).clone()
        return PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32).kinds["visual"].key

    return make


@pytest.mark.parametrize("slabs", [(Slabs(8), Slabs(0, 8)), (Slabs(0, 0, 16), Slabs())])
def test_heads_fall_back_beyond_what_is_usual(side_of, slabs):
    """A segment of three times the calibrated energy: unusual where documents reach 1.5 and 1.8 times, not where they reach 4."""
    plain = side_of(slabs)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(HEADS, 2000, DIM, generator=generator) * plain.spectrum.sqrt().float().unsqueeze(1) * 3.0**0.5
    x = plain.mean.unsqueeze(1) + (z * plain.balance.unsqueeze(1)) @ plain.decode.mT
    rules = Rules(prior_tokens=0, factor=1.5)
    for ratio, fell in (((1.5, 1.8), (True, True)), ((4.0, 4.0), (False, False)), ((1.5, 4.0), (True, False))):
        basis = side_of(slabs, ratio)
        assert basis.usual == pytest.approx(ratio)
        where = choose(observe([(x, basis)], rules))[0]
        assert where.fallback == fell
        for h in range(HEADS):
            most = 1.5 * ratio[h] * basis.expected[h] + SLACK * float(basis.spectrum[h].sum())
            assert where.error[h] <= most
            assert (where.planned[h] > most) == fell[h]
            assert (where.slabs[h] == slabs[h]) == (not fell[h])
    # an artifact that does not know what is usual: eight times what is expected, as ever
    assert choose(observe([(x, plain)], replace(rules, factor=8.0)))[0].fallback == (False, False)
    assert choose(observe([(x, plain)], replace(rules, factor=2.0)))[0].fallback == (True, True)


def angles_of(model, inputs, artifact, row=0):
    """Of the Values of the only image of a row: [LAYERS, HEADS] degrees, from what a layer is given, in numpy."""
    with torch.no_grad(), enable(model, artifact, backend="torch"):
        seen = record(model, **inputs)
    ((run,),) = seen.step.media(row)
    found = np.zeros((LAYERS, HEADS))
    for i, layer in enumerate(seen.layers):
        centred = layer.values[row][:, run.start : run.end].double().numpy()
        z = (centred - centred.mean(1, keepdims=True)) @ artifact.tensors[f"layers.{i}.visual.value_encode"].double().numpy()
        energy = (z**2).mean(1)
        found[i] = np.degrees(np.arccos(np.sqrt(energy[:, : DIM // 2].sum(-1) / energy.sum(-1))))
    return found


@pytest.fixture
def taught(model, prompts, make_artifact):
    """An artifact that knows the angles of ten pages of noise, and inputs of such a page, of a uniform page, and of both."""
    artifact = make_artifact(plan={i: [HeadPlan(Slabs(0, 8, 16), Slabs(0, 0, 16))] * HEADS for i in range(LAYERS)})
    pages = [prompts.batch([[3, prompts.square, 20]], pixels=[n]) for n in range(10)]
    angles = np.stack([angles_of(model, page, artifact) for page in pages])
    mean, spread = angles.mean(0), angles.std(0).clip(0.1)
    for i in range(LAYERS):
        artifact.tensors[f"layers.{i}.visual.value_angle"] = torch.from_numpy(np.stack([mean[i], spread[i]], -1)).float()
    artifact = replace(artifact, method=replace(artifact.method, usual_deviation=3.0))
    usual, both = prompts.batch([[3, prompts.square, 20]], pixels=[77]), prompts.batch([[3, prompts.square, 4, prompts.square, 20]])
    unlike = usual | {"pixel_values": torch.ones_like(usual["pixel_values"])}
    both["pixel_values"] = torch.cat([usual["pixel_values"], unlike["pixel_values"]])

    def deviation(inputs):
        return float(np.sqrt((((angles_of(model, inputs, artifact) - mean) / spread) ** 2).mean()))

    return artifact, {"usual": usual, "unlike": unlike, "both": both}, deviation


def read(model, artifact, inputs):
    """The cache after a prefill and one more turn of text, and the warnings."""
    with torch.no_grad(), enable(model, artifact, backend="torch") as active, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = active.new_cache()
        model(**inputs, past_key_values=cache, use_cache=True)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    return cache, [str(one.message) for one in said if UNLIKE in str(one.message)]


def test_a_page_unlike_the_calibration_is_said_to_be(model, taught):
    artifact, pages, deviation = taught
    assert deviation(pages["usual"]) < 3 < deviation(pages["unlike"])
    for name in ("usual", "unlike", "both"):
        cache, said = read(model, artifact, pages[name])
        stats = cache.stats()
        assert len(said) == (name != "usual") and stats["unlike_calibration"] == (name != "usual"), name
        if name != "both":
            assert stats["deviation"] == pytest.approx(deviation(pages[name]), rel=1e-2)
        assert stats["usual_deviation"] == 3.0
        for words in said:
            assert f"{stats['deviation']:.1f} standard deviations off in the mean head, where 3.0 are usual" in words
            assert "calibrate on documents like these" in words and "\n" not in words
    # the most unlike page of a conversation, not the mean of all pages
    assert read(model, artifact, pages["both"])[0].stats()["deviation"] > 0.8 * deviation(pages["unlike"])


def test_without_angles_nothing_is_compared(model, taught):
    artifact, pages, _ = taught
    tensors = {name: tensor for name, tensor in artifact.tensors.items() if not name.endswith("_angle")}
    old = replace(artifact, tensors=tensors, method=replace(artifact.method, usual_deviation=None))
    stats = read(model, old, pages["unlike"])[0].stats()
    assert (stats["deviation"], stats["usual_deviation"]) == (None, None)
    assert stats["angle"] is not None


def test_deviations_of_layers_belong_together(model, taught):
    """The mean over layers of one image each, however many images rows have; a copied row keeps its own."""
    artifact, *_ = taught
    prepared = PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32)
    layers = {i: (prepared, Monitor.of(2, HEADS)) for i in range(2)}
    assert deviation_of(layers) is None
    for i, squares in enumerate([[[16.0, 1.0], [4.0, 0.0]], [[2.0, 9.0], [4.0, 0.0]]]):
        layers[i][1].deviation = np.array(squares)
    assert deviation_of(layers) == (3.0, 3.0)  # √((16 + 2) / 2), not √16
    for _, monitor in layers.values():
        monitor.select_rows([1])
    assert deviation_of(layers) == (2.0, 3.0)


def test_short_images_are_not_compared(model, taught, prompts):
    artifact, *_ = taught
    cache, said = read(model, artifact, prompts.batch([[3, prompts.wide, 20]], pixels=[0]))  # 52 tokens
    assert (cache.stats()["deviation"], said) == (None, [])


def test_tokens_that_escape_count(model, taught):
    """How unlike a page is does not depend on which of its tokens are coded."""
    artifact, pages, deviation = taught
    escaping = replace(artifact, method=replace(artifact.method, escape_ratio=0.1))
    assert read(model, escaping, pages["usual"])[0].stats()["deviation"] == pytest.approx(deviation(pages["usual"]), rel=1e-2)


def test_blocks_of_text_go_on_up_to_what_is_usual(make_artifact):
    """Blocks that discard twice what is expected: new coordinates where documents reach 1.2 times, not where they reach 3 times."""
    for ratio, past in ((1.2, True), (3.0, False)):
        artifact = make_artifact(plan={i: [HeadPlan(Slabs(8), RAW)] * HEADS for i in range(LAYERS)}, span="all")
        for name in ("tail_ratio", "code_ratio"):
            artifact.tensors[f"layers.0.text.key_{name}"] = torch.full((HEADS, DIM), ratio)
        prepared = PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32)
        store = Store(1, HEADS, DIM, torch.float32, torch.device("cpu"), prepared)
        blocks = TextBlocks(store, prepared.kinds["text"], Rules(prior_tokens=0, factor=1.5))
        expected = prepared.kinds["text"].key.expected
        written = Writing(blocks.shared, discarded=[[2 * 64 * one for one in expected], [0.0] * HEADS], tokens=64)
        assert blocks._past_bound(written) == past
