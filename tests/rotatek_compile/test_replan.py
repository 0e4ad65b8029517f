"""Another budget for an artifact: plans from what it holds, and refusals in one sentence."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.cost_curves import dense_bytes, needed_share, plan_bytes
from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan, plan_tensors
from rotatek_compile.planning import searches_of_bytes, smallest_share, tokens_to_pay
from rotatek_compile.replan import costs_of, replanned
from rotatek_compile.runtime.prepared import PreparedArtifact

DIM = 32
SHAPE = Geometry(
    model_type="tiny",
    layers=(LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=DIM),) * 2,
    visual_token_ids=(5,),
)
LEVELS = (Slabs(), Slabs(8), Slabs(16))
RAW = Slabs(DIM)


def artifact(values=False, **options):
    """Head 1 of layer 0 matters most, head 0 of layer 1 not at all; `values`: those of the Values are known too."""
    cost = {0: [1.0, 5.0], 1: [0.0, 0.5]}
    tensors = plan_tensors({i: [HeadPlan(Slabs(8), RAW)] * 2 for i in cost})
    for i, heads in cost.items():
        table = torch.tensor([[c, c / 4, c / 100] for c in heads])
        tensors[f"layers.{i}.key_sensitivity"] = table
        if values:
            tensors[f"layers.{i}.value_sensitivity"] = table / 2
        for side in ("key", "value"):
            tensors[f"layers.{i}.visual.{side}_spectrum"] = torch.logspace(0, -3, DIM).repeat(2, 1)
    return Artifact(SHAPE, Method(levels=LEVELS, **options), tensors, {}, {})


def ranks(made):
    assert all(head == HeadPlan(Slabs(head.key.native), RAW) for heads in made.plan().values() for head in heads)
    return {i: [head.key.native for head in heads] for i, heads in made.plan().items()}


def test_ranks_follow_sensitivities_and_nest():
    before = artifact()
    plans = {ratio: ranks(replanned(before, keep_ratio=ratio)) for ratio in (0.25, 0.5, 0.75, 1.0)}
    assert {ratio: sum(map(sum, plan.values())) for ratio, plan in plans.items()} == {0.25: 32, 0.5: 64, 0.75: 96, 1.0: 128}
    assert plans[0.25][0][1] >= plans[0.25][0][0] > plans[0.25][1][0] == 0
    for small, large in ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        assert all(a <= b for i in plans[small] for a, b in zip(plans[small][i], plans[large][i], strict=True))
    assert ranks(before) == {0: [8, 8], 1: [8, 8]}
    assert replanned(before, keep_ratio=0.5).method.keep_ratio == 0.5


def test_uniform_artifacts_stay_uniform():
    assert ranks(replanned(artifact(allocation="uniform"), keep_ratio=0.5)) == {0: [16, 16], 1: [16, 16]}
    made = replanned(artifact(values=True, allocation="uniform"), kv_budget=0.25)
    assert len({head for heads in made.plan().values() for head in heads}) == 1
    assert 0.15 < plan_bytes(SHAPE, made.plan()) / dense_bytes(SHAPE) <= 0.25


def test_raw_values_take_half_of_a_budget():
    """Without sensitivities of the Values: at b of the dense bytes Values take one half, Keys the rest."""
    made = replanned(artifact(), kv_budget=0.625)
    assert ranks(made) == ranks(replanned(artifact(), keep_ratio=0.25))
    assert made.bytes_per_token() == 0.625 * SHAPE.dense_bytes_per_token()
    assert made.method.kv_budget is None and made.method.keep_ratio == 0.25


@pytest.mark.parametrize("share", [1 / 512, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0])
def test_a_budget_of_bytes(share):
    made = replanned(artifact(values=True), kv_budget=share)
    assert plan_bytes(SHAPE, made.plan()) <= share * dense_bytes(SHAPE)
    heads = [head for heads in made.plan().values() for head in heads]
    assert made.method.kv_budget == share and (made.method.key_bits, made.method.value_bits) == ("auto", "auto")
    assert made.method.keep_ratio == pytest.approx(sum(head.key.rank for head in heads) / (4 * DIM), abs=1e-4)
    if share == 1 / 8:
        assert made.plan()[0][1].bytes_per_token > made.plan()[1][0].bytes_per_token


@pytest.mark.parametrize(
    ("image", "share", "paid"), [(100, 1 / 8, 100), (100, 1 / 32, 256), (400, 1 / 64, 512), (9000, 1 / 8, 512), (1, 0.5, 16)]
)
@pytest.mark.parametrize("how", ["allocated", "uniform"])
@pytest.mark.parametrize("escape_ratio", [0.0, 1 / 256])
def test_short_images_have_their_own_means_and_scales(image, share, paid, how, escape_ratio):
    """A budget leaves room for a set in every image as short as those calibrated on, while means take at most an eighth of it."""
    made = replanned(artifact(values=True, image_tokens=image, allocation=how, escape_ratio=escape_ratio), kv_budget=share)
    got = tokens_to_pay(made.method, share)
    assert (got == paid if not escape_ratio else paid <= got <= 1.2 * paid) and made.method.image_tokens == image
    paid = got
    assert PreparedArtifact(made).tokens_per_own <= paid
    assert needed_share(SHAPE, made.plan(), escape_ratio, paid) <= share * (1 + 1e-9)
    for tokens in range(512, 4096, 173):  # what a sequence of such images takes, each with its own parts
        sets = tokens // paid
        codes = plan_bytes(SHAPE, made.plan(), tokens)
        parts = plan_bytes(SHAPE, made.plan(), 0)
        assert codes + (sets - 1) * parts <= (share - escape_ratio) * dense_bytes(SHAPE, tokens) + escape_ratio * codes
    spent = plan_bytes(SHAPE, made.plan(), paid) / dense_bytes(SHAPE, paid)
    if how == "allocated" and share >= 1 / 8:  # steps of eight directions are coarse below
        assert spent > 0.85 * (share - escape_ratio)


@pytest.mark.parametrize("image", [1, 64, 400, 9000])
@pytest.mark.parametrize("escape_ratio", [0.0, 1 / 256, 1 / 64, 0.1])
def test_every_budget_from_the_smallest_on_has_a_plan(image, escape_ratio):
    """Means of short images are paid from what escape tokens leave."""
    made = artifact(values=True, image_tokens=image, escape_ratio=escape_ratio)
    least = smallest_share(SHAPE, escape_ratio)
    for share in (least, 1.01 * least, 1.2 * least, least + 0.01, least + 0.1):
        for search in searches_of_bytes(SHAPE, costs_of(made), made.method, share):
            for plan in (search.uniform, search.plan(search.best())):
                assert needed_share(SHAPE, plan, escape_ratio, tokens_to_pay(made.method, share)) <= share * (1 + 1e-9)


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 2])
def test_escape_tokens_are_paid_for(share):
    """The ratio of the artifact stays, and codes get what it leaves."""
    made = replanned(artifact(values=True, escape_ratio=1 / 64), kv_budget=share)
    assert made.method.escape_ratio == 1 / 64 and made.method.kv_budget == share
    assert needed_share(SHAPE, made.plan(), 1 / 64) <= share
    assert made.bytes_per_token() < replanned(artifact(values=True), kv_budget=share).bytes_per_token() * 1.02
    codes = sum(head.bytes_per_token for heads in made.plan().values() for head in heads)
    assert made.bytes_per_token() == codes * 63 / 64 + SHAPE.dense_bytes_per_token() / 64
    with pytest.warns(UserWarning, match="0.01562 of the tokens raw would take most of --kv-budget 0.03: this plan has no escape tokens"):
        assert replanned(made, kv_budget=0.03).method.escape_ratio == 0


def test_from_bytes_to_a_ratio_and_back():
    by_bytes = replanned(artifact(values=True), kv_budget=0.125)
    assert ranks(replanned(by_bytes, keep_ratio=0.5)) == ranks(replanned(artifact(values=True), keep_ratio=0.5))
    assert replanned(replanned(by_bytes, keep_ratio=0.5), kv_budget=0.125).plan() == by_bytes.plan()


def test_bits_of_the_artifact_stay():
    made = replanned(artifact(values=True, key_bits="8", value_bits="4"), keep_ratio=0.5)
    heads = [head for heads in made.plan().values() for head in heads]
    assert sum(head.key.byte for head in heads) == 64 and {head.value for head in heads} == {Slabs(nibble=32)}


def test_without_sensitivities():
    bare = replace(artifact(), method=Method(levels=()))
    with pytest.warns(UserWarning, match="no sensitivities"):
        assert ranks(replanned(bare, keep_ratio=0.5)) == {0: [16, 16], 1: [16, 16]}


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        (False, {}, "give one of them"),
        (False, {"keep_ratio": 0.5, "kv_budget": 0.75}, "give one of them"),
        (False, {"keep_ratio": 0.0}, "--keep-ratio 0 is out of range"),
        (False, {"kv_budget": 1.5}, "--kv-budget 1.5 is out of range"),
        (False, {"kv_budget": 0.5}, "--kv-budget 0.5 is too small: .* takes 0.5"),
        (True, {"kv_budget": 0.001}, "--kv-budget 0.001 is too small: the means of a segment of 512 tokens alone take 0.001953"),
        (True, {"kv_budget": 0.001953}, "use at least 0.00196$"),  # not the number that is refused
        (True, {"kv_budget": "0.1"}, "--kv-budget is '0.1', expected a number"),
        (False, {"keep_ratio": True}, "--keep-ratio is True, expected a number"),
    ],
)
def test_refusals(values, asked, words):
    with pytest.raises(UsageError, match=words):
        replanned(artifact(values), **asked)


def test_rivals_take_what_they_can():
    knockout = {f"layers.{i}.knockout": torch.tensor([0.5, 1.0]) for i in range(2)}
    rival = replace(artifact(), method=Method(rival="head-drop", kv_budget=0.25), tensors=knockout)
    assert replanned(rival, kv_budget=0.1).method.kv_budget == 0.1
    assert replanned(rival, keep_ratio=0.5).method.kv_budget is None  # of (layer, head) pairs
    with pytest.raises(UsageError, match="int4 has no keep ratio; use --kv-budget"):
        replanned(replace(rival, method=Method(rival="int4")), keep_ratio=0.5)
    think = replace(rival, method=Method(rival="think", keep_ratio=0.5))
    assert replanned(think, keep_ratio=0.25).method.keep_ratio == 0.25
    with pytest.raises(UsageError):
        replanned(think, kv_budget=0.1)  # stores Values as they are
