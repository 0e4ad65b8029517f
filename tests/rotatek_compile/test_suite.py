"""Whole evaluations on the tiny model: a killed run goes on and gives the same files, and the table says what was measured."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from rotatek_compile.comparison import span_share
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.journal import FILE, Journal, Shard
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.methods import Methods
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.enable import enable
from rotatek_compile.suite import Measured, batch_sizes, read_results, run_entries, write_results

FACTS = dict.fromkeys(("data", "model", "artifact", "dtype", "device", "torch", "transformers", "rotatek"), "x")
ASKS = ("after", "with")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def skilled(documents):
    return [replace(d, sample=replace(d.sample, skill=("find", "count")[n % 2])) for n, d in enumerate(documents)]


@pytest.fixture
def evaluation(tiny, fake_processor, skilled, make_artifact):
    """Runs dense, the artifact and int4 over five documents in batches of two, both modes; `die_at` prefills it is killed."""

    def run(folder, resume=False, die_at=None, facts=FACTS, names=("int4",), shard=None):
        prefills = []

        class Mortal(Evaluator):
            def prefill(self, items):
                prefills.append(self.ask)
                if len(prefills) == die_at:
                    raise Killed
                return super().prefill(items)

        with enable(tiny, make_artifact(8), backend="torch") as active:
            methods = Methods(active)
            entries = [methods.dense(), methods.compiled(), *methods.chosen(names, (), ())]
            evaluators = [Mortal(tiny, fake_processor, ask, (2,), 4) for ask in ASKS]
            with Journal(folder, facts, ASKS, [e.label for e in entries], batch_sizes(5, 2), resume, shard) as journal:
                measured = run_entries(evaluators, entries, skilled, 2, journal=journal)
        if shard is None:
            write_results(folder, measured, facts)
        return measured, prefills

    return run


def test_resuming_never_overwrites_a_file_of_another_kind(tmp_path):
    (tmp_path / FILE).write_text("precious")
    with pytest.raises(RotateKError, match="is no evaluation of rotatek-eval"):
        Journal(tmp_path, FACTS, ASKS, ["dense"], [1], resume=True)
    assert (tmp_path / FILE).read_text() == "precious"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("die_at", [1, 3, 4, 6])
def test_killed_run_goes_on_and_gives_the_same_files(evaluation, tmp_path, die_at):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluation(whole)
    with pytest.raises(Killed):
        evaluation(killed, die_at=die_at)
    assert list(contents(killed)) == [FILE]
    _, prefills = evaluation(killed, resume=True)
    assert len(prefills) == 6 - (die_at - 1)  # finished batches are not run again
    assert contents(killed) == contents(whole) and set(contents(whole)) == {FILE, "results.csv"}
    assert evaluation(killed, resume=True)[1] == []  # nothing left to do
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize("cut", [1, 40, 400, 1700])
def test_torn_tail_is_measured_again(evaluation, tmp_path, cut):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    evaluation(whole)
    evaluation(torn)
    (torn / FILE).write_bytes((torn / FILE).read_bytes()[:-cut])
    evaluation(torn, resume=True)
    assert contents(torn) == contents(whole)


def test_damaged_line_is_measured_again(evaluation, tmp_path):
    evaluation(tmp_path / "whole")
    evaluation(tmp_path / "damaged")
    lines = (tmp_path / "damaged" / FILE).read_bytes().splitlines(keepends=True)
    lines[8] = b'{"ask": "after"}\n'
    (tmp_path / "damaged" / FILE).write_bytes(b"".join(lines))
    with pytest.raises(Killed):
        evaluation(tmp_path / "damaged", resume=True, die_at=1)
    assert (tmp_path / "damaged" / FILE).read_bytes() == b"".join(lines[:7])  # what followed the last whole batch is gone
    _, prefills = evaluation(tmp_path / "damaged", resume=True)
    assert len(prefills) == 5 and contents(tmp_path / "damaged") == contents(tmp_path / "whole")


@pytest.mark.parametrize("twice", [1, 3, 5, 20])
def test_a_line_that_stands_twice_is_measured_again(evaluation, tmp_path, twice):
    """It pushes the last of a batch out: six lines of the right mode, batch and methods, but of one document answered twice."""
    evaluation(tmp_path / "whole")
    evaluation(tmp_path / "twice")
    lines = (tmp_path / "twice" / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / "twice" / FILE).write_bytes(b"".join(lines[: twice + 1] + lines[twice:]))
    _, prefills = evaluation(tmp_path / "twice", resume=True)
    assert len(prefills) == (6 if twice < 7 else 3) and contents(tmp_path / "twice") == contents(tmp_path / "whole")


def test_killed_while_writing_the_first_line(evaluation, tmp_path):
    (tmp_path / FILE).write_text('{"evalua')
    evaluation(tmp_path, resume=True)
    evaluation(tmp_path / "whole")
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_several_processes_share_an_evaluation(evaluation, tmp_path):
    """Of three batches one process takes the first and last, the other the second; one that finds no batch does nothing."""
    evaluation(tmp_path / "whole")
    shared = tmp_path / "shared"
    assert len(evaluation(shared, shard=Shard(1, 2))[1]) == 4
    assert evaluation(tmp_path / "idle", shard=Shard(4, 4))[1] == []
    with pytest.raises(Killed):
        evaluation(shared, shard=Shard(2, 2), die_at=2)
    with pytest.raises(RotateKError, match="documents-1-of-2.jsonl holds an evaluation already; pass --resume"):
        evaluation(shared)
    assert len(evaluation(shared, shard=Shard(2, 2), resume=True)[1]) == 1  # the other mode's batch
    assert evaluation(shared, resume=True)[1] == []
    assert {name: contents(shared)[name] for name in (FILE, "results.csv")} == contents(tmp_path / "whole")


def test_what_no_process_has_measured_is(evaluation, tmp_path):
    evaluation(tmp_path / "whole")
    evaluation(tmp_path / "shared", shard=Shard(2, 2))
    with pytest.raises(RotateKError, match='documents-2-of-2.jsonl was made with data "x", this run has "y"'):
        evaluation(tmp_path / "shared", resume=True, facts=FACTS | {"data": "y"})
    assert len(evaluation(tmp_path / "shared", resume=True)[1]) == 4
    assert contents(tmp_path / "shared")[FILE] == contents(tmp_path / "whole")[FILE]


@pytest.mark.parametrize(
    "name", ["documents-x-of-y.jsonl", "documents-3-of-2.jsonl", "documents-0-of-2.jsonl", "documents-1-of-2-of-2.jsonl"]
)
def test_a_file_that_no_process_wrote_is_named(tmp_path, name):
    (tmp_path / name).write_text("precious\n")
    with pytest.raises(RotateKError, match=f"{name} is not what a process I of N writes, documents-I-of-N.jsonl; move it away"):
        Journal(tmp_path, FACTS, ASKS, ["dense"], [1], resume=True)
    assert contents(tmp_path) == {name: b"precious\n"}
    with Journal(tmp_path, FACTS, ASKS, ["dense"], [1, 1], False, Shard(1, 2)):  # reads no other's file
        pass


def test_two_runs_at_once(evaluation, tmp_path):
    """The second would cut off what the first writes; once that is gone, by whatever end, it may go on."""
    with Journal(tmp_path, FACTS, ASKS, ["dense"], [1, 1], False, Shard(1, 2)) as first:
        before = first.file.read_bytes()
        with pytest.raises(RotateKError, match="another rotatek-eval is writing .*documents-1-of-2.jsonl; wait for it"):
            Journal(tmp_path, FACTS, ASKS, ["dense"], [1, 1], True, Shard(1, 2))
        assert first.file.read_bytes() == before
        with Journal(tmp_path, FACTS, ASKS, ["dense"], [1, 1], False, Shard(2, 2)):
            pass
    with Journal(tmp_path, FACTS, ASKS, ["dense"], [1, 1], True, Shard(1, 2)) as again:
        assert again.file.read_bytes() == before


def test_parts_of_other_numbers_of_processes(evaluation, tmp_path):
    """Halves and thirds of one evaluation, one of them torn, go together as far as they go."""
    evaluation(tmp_path / "whole")
    shared = tmp_path / "shared"
    evaluation(shared, shard=Shard(1, 2))
    evaluation(shared, shard=Shard(2, 3))
    torn = shared / "documents-1-of-2.jsonl"
    torn.write_bytes(torn.read_bytes()[:-5])
    assert len(evaluation(shared, resume=True)[1]) == 1  # the last batch of the second mode
    assert {name: contents(shared)[name] for name in (FILE, "results.csv")} == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "2", "1/2/3", "a/b", "-1/2", ""])
def test_which_process_it_is(text):
    with pytest.raises(UsageError, match=r"is not I/N with 1 <= I <= N; pass 1/4"):
        Shard.parse(text)
    assert Shard.parse("2/3") == Shard(2, 3) and list(Shard(2, 3).numbers(9)) == [1, 4, 7]


def test_other_evaluations_are_not_mixed(evaluation, tmp_path):
    evaluation(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RotateKError, match="holds an evaluation already; pass --resume"):
        evaluation(tmp_path)
    with pytest.raises(RotateKError, match='made with data "x", this run has "y"'):
        evaluation(tmp_path, resume=True, facts=FACTS | {"data": "y"})
    with pytest.raises(RotateKError, match="made with methods"):
        evaluation(tmp_path, resume=True, names=("int8",))
    assert contents(tmp_path) == before
    (tmp_path / FILE).write_text("something else\n")
    with pytest.raises(RotateKError, match="not an evaluation"):
        evaluation(tmp_path, resume=True)


def test_folder_that_cannot_be_used(evaluation, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RotateKError, match="--output .* cannot be used"):
        evaluation(tmp_path / "file")


def test_table(evaluation, tmp_path, skilled):
    measured, _ = evaluation(tmp_path)
    rows = read_results(tmp_path / "results.csv")
    assert [(r["ask"], r["method"], r["skill"]) for r in rows] == [
        (ask, method, skill) for ask in ASKS for method in ("dense", "artifact", "int4") for skill in ("all", "count", "find")
    ]
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines[0]["evaluation"]["methods"] == ["dense", measured[1].entry.label, "int4"]
    for row in rows:
        own = [o for o in lines[1:] if o["ask"] == row["ask"] and o["method"].split(" (")[0] == row["method"]]
        own = [o for o in own if row["skill"] in ("all", o["skill"])]
        assert len(own) == int(row["samples"]) == {"all": 5, "find": 3, "count": 2}[row["skill"]]
        kl = sum(o["kl"] for o in own) / sum(o["answer_tokens"] for o in own)
        assert float(row["kl"]) == pytest.approx(kl, rel=1e-5) and float(row["kl_low"]) <= kl * 1.00001 <= float(row["kl_high"]) * 1.0001
        assert float(row["kv_bytes"]) == pytest.approx(sum(o["bytes"]["total"] for o in own) / len(own), abs=0.1)
        assert float(row["exact_match"]) == sum(o["exact"] for o in own) / len(own)
    assert [o["id"] for o in lines[1:] if o["ask"] == "with" and o["method"] == "int4"] == [d.sample.id for d in skilled]
    assert {r["rival_ratio"] for r in rows} == {""}  # nothing of ours was asked for at a budget
    loss = next(r for r in rows if r["method"] == "dense")
    assert loss["exact_match_loss"] == loss["exact_match_loss_low"] == loss["exact_match_loss_high"] == "0"


def test_loss_is_paired(evaluation, tmp_path):
    measured, _ = evaluation(tmp_path)
    dense = replace_exact(measured[0].row, [True, True, True, False, True])
    worse = replace_exact(measured[1].row, [True, False, True, False, False])
    found = Measured("after", measured[1].entry, worse, dense).to_json()
    assert found["exact_match_loss"] == pytest.approx(0.4)
    low, high = found["exact_match_loss_interval"]
    assert 0 <= low <= 0.4 <= high <= 1.0
    assert set(found["skills"]) == {"find", "count"} and found["skills"]["count"]["exact_match"] == 0


def replace_exact(row, exact):
    return replace(row, outcomes=[replace(o, exact=e) for o, e in zip(row.outcomes, exact, strict=True)])


def test_results_without_a_journal_are_the_same(evaluation, tiny, fake_processor, skilled, make_artifact, tmp_path):
    measured, _ = evaluation(tmp_path)
    with enable(tiny, make_artifact(8), backend="torch") as active:
        methods = Methods(active)
        entries = [methods.dense(), methods.compiled(), *methods.chosen(["int4"], (), ())]
        plain = run_entries([Evaluator(tiny, fake_processor, ask, (2,), 4) for ask in ASKS], entries, skilled, 2)
    assert [m.to_json() for m in plain] == [m.to_json() for m in measured]


def test_ours_beside_the_best_rivals(tiny, fake_processor, skilled, make_artifact, tmp_path):
    """The artifact takes a fifth of the span and int4 0.31; int8 cannot do with less than a half."""
    with enable(tiny, make_artifact(plan=[[HeadPlan(Slabs(0, 0, 16), Slabs(0, 0, 32))] * 2] * 3, kv_budget=0.4), backend="torch") as active:
        methods = Methods(active)
        entries = [methods.dense(), methods.compiled(), *methods.chosen(["int4", "int8"], (), ())]
        measured = run_entries([Evaluator(tiny, fake_processor, ask, (2,), 4) for ask in ASKS], entries, skilled, 2)
    for ask in ASKS:
        _, own, int4, int8 = [m for m in measured if m.ask == ask]
        found = own.to_json()["against"]
        assert (found["rival"], found["above"]) == ("int4", "int8") and found["rival_kl"] == pytest.approx(int4.to_json()["kl"])
        assert found["rival_ratio"] == pytest.approx(own.to_json()["kl"] / int4.to_json()["kl"])
        assert found["rival_low"] <= found["rival_ratio"] <= found["rival_high"]
        assert found["above_span"] == span_share(int8.row) > 0.5 > span_share(int4.row) > span_share(own.row)
    write_results(tmp_path, measured, FACTS)
    rows = read_results(tmp_path / "results.csv")
    filled = [(r["ask"], r["method"], r["skill"]) for r in rows if r["rival_ratio"]]
    assert filled == [(ask, "artifact", "all") for ask in ASKS]


def test_reading_a_table_that_is_none(tmp_path):
    with pytest.raises(RotateKError, match="cannot be read"):
        read_results(tmp_path / "no.csv")
    with (tmp_path / "other.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["a"], ["1"]])
    with pytest.raises(RotateKError, match="no table of rotatek-eval"):
        read_results(tmp_path / "other.csv")


def test_artifact_hash_sees_tensors_and_method(make_artifact):
    from rotatek_compile.suite import artifact_hash

    artifact = make_artifact(8)
    changed = artifact.tensors | {"layers.0.key_plan": torch.tensor([[8, 0, 0], [16, 0, 0]], dtype=torch.int32)}
    hashes = {artifact_hash(artifact), artifact_hash(replace(artifact, tensors=changed)), artifact_hash(make_artifact(8, window=64))}
    assert len(hashes) == 3 and artifact_hash(make_artifact(8)) in hashes
