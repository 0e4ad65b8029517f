"""Escape tokens and own bases are chosen where they pay beyond noise; the simple choice stays otherwise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotatek_compile import coding_choice
from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.coding_choice import CodingChoice
from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.parallel import Processes
from rotatek_compile.plan import HeadPlan, plan_tensors

SHAPE = Geometry(
    model_type="tiny",
    layers=(LayerGeometry(layer_type="full_attention", query_heads=2, kv_heads=1, head_dim=32),),
    visual_token_ids=(5,),
)
DOCUMENTS = 30
SMALLER = 1 / 256, 1 / 64


def plan(count):
    return {0: [HeadPlan(Slabs(count), Slabs(32))]}


ARTIFACT = Artifact(SHAPE, Method(prior_tokens=0, kv_budget=0.25), plan_tensors(plan(24)), {}, {})


@pytest.fixture
def choose(monkeypatch):
    """The artifact chosen, the report, and (escape ratio, prior, number of documents) of every reading.

    costs: factor on the KL of the simple choice by (escape ratio, prior), or a function of the documents' numbers.
    """

    def run(costs, ratios=SMALLER, priors=(256,), documents=DOCUMENTS, scale=0.1, together=None, artifact=ARTIFACT, room=1.0):
        read = []
        plain = scale * np.random.default_rng(0).lognormal(0, 1, documents)

        def measured(cutter, docs, some):
            where = np.array([doc.number for doc in docs], dtype=int)
            setting = some.method.escape_ratio, some.method.prior_tokens
            read.append((*setting, len(docs)))
            factor = costs.get(setting, 1.0)
            return plain[where] * (factor(where) if callable(factor) else factor)

        def plan_for(method):
            if method.escape_ratio > room:
                raise UsageError("no room")
            return plan(24 - round(512 * method.escape_ratio))

        monkeypatch.setattr(coding_choice, "kl_through_cache", measured)
        docs = [SimpleNamespace(number=n, items=[n], scored=torch.ones(1, 4)) for n in range(documents)]
        choice = CodingChoice(None, docs, plan_for, together or Processes())
        chosen = choice.chosen(artifact, ratios, priors)
        return chosen, choice, read

    return run


def setting(artifact):
    return artifact.method.escape_ratio, artifact.method.prior_tokens


def test_what_pays_is_taken_with_its_plan(choose):
    chosen, choice, _ = choose({(1 / 256, 0): 0.7, (1 / 64, 0): 0.5, (1 / 64, 256): 0.3})
    assert setting(chosen) == (1 / 64, 256) and chosen.plan() == plan(16)
    report = choice.report(chosen)
    assert (report["escape_ratio"], report["prior_tokens"], report["documents"]) == (1 / 64, 256, DOCUMENTS)
    assert [(t["escape_ratio"], t["prior_tokens"]) for t in report["tried"]] == [(0, 0), (1 / 256, 0), (1 / 64, 0), (1 / 64, 256)]
    assert [t["kl"] / report["tried"][0]["kl"] for t in report["tried"]] == pytest.approx([1, 0.7, 0.5, 0.3])
    assert [t["ratio"] for t in report["tried"]][0] is None and report["tried"][2]["ratio"] == pytest.approx([0.5, 0.5])
    assert choice.kl(chosen) == pytest.approx(report["tried"][3]["kl"])
    assert report["tried"][0]["kl"] == pytest.approx(choice.trials[0].kl.sum() / (4 * DOCUMENTS))


def test_noise_is_not_taken(choose):
    """Less in sum, but by one document: the interval of the ratio reaches 1."""
    chosen, choice, _ = choose({(1 / 64, 0): lambda where: np.where(where == 3, 0.0, 1.0)})
    tried = choice.report(chosen)["tried"]
    assert chosen is ARTIFACT and tried[2]["kl"] < tried[0]["kl"] and tried[2]["ratio"][0] < 1 <= tried[2]["ratio"][1]


def test_what_costs_more_is_not_read_further(choose):
    chosen, choice, read = choose({(1 / 256, 0): 1.2, (1 / 64, 0): lambda where: np.where(where < 10, 0.9, 9.0)})
    assert chosen is ARTIFACT
    assert read == [(0, 0, 10), (0, 0, 20), (1 / 256, 0, 10), (1 / 64, 0, 10), (1 / 64, 0, 20), (0, 256, 10)]
    first, *others = choice.report(chosen)["tried"]
    assert first["kl"] > 0 and [t["documents"] for t in others] == [10, 30, 10]
    assert others[0]["kl"] is None and others[1]["ratio"][0] > 1


@pytest.mark.parametrize(("given", "count"), [({"documents": 11}, 0), ({"scale": 1e-6}, 1)])
def test_when_there_is_nothing_to_choose(choose, given, count):
    """Too few documents to say anything, or a loss too small to be worth slower prefill."""
    chosen, choice, _ = choose({(1 / 64, 0): 0.1}, **given)
    assert chosen is ARTIFACT and len(choice.report(chosen)["tried"]) == count
    assert (choice.kl(chosen) is None) == (count == 0)


def test_what_is_forced_stays(choose):
    chosen, _, _ = choose({(0, 256): 0.5, (1 / 64, 0): 0.1}, ratios=())
    assert setting(chosen) == (0, 256) and chosen.plan() == ARTIFACT.plan()
    chosen, choice, _ = choose({(1 / 64, 0): 0.5, (0, 256): 0.1}, priors=())
    assert setting(chosen) == (1 / 64, 0) and len(choice.trials) == 3


def test_no_room_for_raw_tokens(choose):
    chosen, choice, _ = choose({(1 / 256, 0): 0.9, (1 / 64, 0): 0.1}, room=1 / 100)
    assert setting(chosen) == (1 / 256, 0)
    assert 1 / 64 not in [trial.artifact.method.escape_ratio for trial in choice.trials]
