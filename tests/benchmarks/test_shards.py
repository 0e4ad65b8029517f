"""Documents divided among processes: every batch once, and together what one process finds."""

import csv
import json
import sys

import pytest
import shards
from shards import Shard, Values, read_values

from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.outcomes import Outcome


def outcome(name, method="m", exact=True):
    return Outcome(name, "s", method, exact, 1.0, 0.25, 2, "text", {"span": 1.0})


def test_every_batch_is_someones():
    taken = [batch for number in (1, 2, 3) for batch in Shard(number, 3).batches(23, 5)]
    assert sorted(number for number, _ in taken) == [0, 1, 2, 3, 4]
    assert sorted(i for _, some in taken for i in range(23)[some]) == list(range(23))
    assert [number for number, _ in Shard(2, 3).batches(23, 5)] == [1, 4] and list(Shard(3, 3).batches(9, 5)) == []
    assert Shard.parse("2/3") == Shard(2, 3)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/2"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="is not I/N"):
        Shard.parse(text)


def values_in(folder, number, batches, header=None):
    values = Values.begin(header or {"part": "curve"}, Shard(number, 2).file(folder, "codec-curve"))
    for batch in batches:
        values.add(batch, {"m": [outcome(f"{batch}a"), outcome(f"{batch}b", exact=False)]}, note={"said": batch})
    return values.file


def test_files_are_put_together_in_the_order_of_the_data(tmp_path):
    files = [values_in(tmp_path, 1, [2, 0]), values_in(tmp_path, 2, [1])]
    whole = read_values(files)
    assert [o.id for o in whole.row("m").outcomes] == ["0a", "0b", "1a", "1b", "2a", "2b"] and whole.documents == 6
    assert whole.row("m", "ours").method == "ours" and whole.row("m").outcomes[0] == outcome("0a")
    assert whole.notes == {n: {"said": n} for n in range(3)} and whole.header == {"part": "curve"}
    text = files[1].read_text()
    files[1].write_text(text + text.splitlines()[1][:40])  # killed while writing
    assert read_values(files).documents == 6


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    first, second = values_in(tmp_path, 1, [0]), values_in(tmp_path, 2, [0])
    with pytest.raises(RotateKError, match="holds batch 0, which .* holds too"):
        read_values([first, second])
    with pytest.raises(RotateKError, match="part differs"):
        read_values([first, values_in(tmp_path, 2, [1], {"part": "ablations"})])
    second.write_text(json.dumps({"header": {"part": "curve"}}) + "\nno json\n")
    with pytest.raises(RotateKError, match="no per-document values"):
        read_values([second])
    with pytest.raises(RotateKError, match="no finished batch"):
        read_values([values_in(tmp_path, 1, [])])


def test_missing_shards_are_named(tmp_path, capsys):
    own = [values_in(tmp_path, 1, [0]), tmp_path / "broken-1-of-1.jsonl"]
    assert shards.by_run(own) == [[own[1]], [own[0]]]
    assert capsys.readouterr().err == "codec-curve: 1 of 2 shards\n"


@pytest.fixture(scope="module")
def artifact(checkpoint, data_file, moments_cache, tmp_path_factory):
    """An artifact for a budget, of the tiny checkpoint."""
    from rotatek_compile import CompileOptions, compile_artifact

    target = tmp_path_factory.mktemp("budget") / "artifact"
    small = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True, "kv_budget": 0.5}
    compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=target, **small))
    return target


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_codec_in_two_processes_is_as_in_one(artifact, data_file, tmp_path, monkeypatch, capsys):
    import bench_codec

    for part, samples, budgets in (("curve", 3, (0.6, 0.75)), ("ablations", 2, (0.75,))):
        same = [artifact, "--data", data_file, "--samples", samples, "--batch-size", 1, "--device", "cpu", "--max-new-tokens", 2]
        same += ["--budgets", *budgets, "--part"]
        assert run(bench_codec, monkeypatch, *same, part, "--output", tmp_path / "one") == 0
        for number in (1, 2):
            assert run(bench_codec, monkeypatch, *same, part, "--shard", f"{number}/2", "--output", tmp_path / "two") == 0
        assert not (tmp_path / "two" / f"codec-{part}.csv").exists()
    files = sorted((tmp_path / "two").iterdir())
    assert run(bench_codec, monkeypatch, "--merge", *files, "--output", tmp_path / "two") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("codec-curve.csv")
    for part in ("curve", "ablations"):
        one, two = (rows_of(tmp_path / folder / f"codec-{part}.csv") for folder in ("one", "two"))
        assert one == two and {row["samples"] for row in one if row["skill"] == "all"} == {"3" if part == "curve" else "2"}
    curve = rows_of(tmp_path / "one" / "codec-curve.csv")
    assert [row["budget"] for row in curve if row["method"] == "dense"] == ["0.6", "0.75"]
    ours = [row for row in curve if row["method"] == "rotatek"]
    assert [row["budget"] for row in ours] == ["0.6", "0.75"] and all(row["rival"] and row["rival_kl"] for row in ours)
    ablations = rows_of(tmp_path / "one" / "codec-ablations.csv")
    [base] = [row for row in ablations if row["group"] == "as planned"]
    assert base["base_ratio"] == "" and len([row for row in ablations if row["base_ratio"]]) > 10
    uniform = next(row for row in ablations if row["setting"] == "KV budget 0.75, same plan in every head")
    assert float(uniform["base_ratio"]) == pytest.approx(float(uniform["kl"]) / float(base["kl"]), rel=1e-4)


def test_broken_inputs_in_two_processes_are_as_in_one(artifact, data_file, tmp_path, monkeypatch, capsys):
    import bench_broken_inputs

    same = [artifact, "--data", data_file, "--samples", 2, "--device", "cpu", "--max-new-tokens", 2]
    alone = run(bench_broken_inputs, monkeypatch, *same, "--output", tmp_path / "one.csv")
    printed = capsys.readouterr().out
    assert run(bench_broken_inputs, monkeypatch, *same, "--shard", "1/2") == 2  # nowhere to put what is found
    for number in (1, 2):
        assert run(bench_broken_inputs, monkeypatch, *same, "--shard", f"{number}/2", "--values", tmp_path / "values") == 0
    capsys.readouterr()
    files = sorted((tmp_path / "values").iterdir())
    assert run(bench_broken_inputs, monkeypatch, "--merge", *files, "--output", tmp_path / "two.csv") == alone
    assert capsys.readouterr().out == printed and (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    rows = rows_of(tmp_path / "one.csv")
    assert [row["pages"] for row in rows] == list(bench_broken_inputs.CHANGES) and {row["documents"] for row in rows} == {"2"}


def test_time_ends_a_shard_after_a_batch(artifact, data_file, tmp_path, monkeypatch):
    import bench_codec

    same = [artifact, "--data", data_file, "--samples", 4, "--batch-size", 1, "--budgets", 0.6, "--device", "cpu", "--max-new-tokens", 2]
    assert run(bench_codec, monkeypatch, *same, "--seconds", 0.001, "--output", tmp_path) == 0
    assert {row["samples"] for row in rows_of(tmp_path / "codec-curve.csv") if row["skill"] == "all"} == {"1"}
