"""The table of RAP: how much of the way each row goes, and figures per document."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from rotatek_compile.errors import RotateKError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("rotatek_bench_rap", FOLDER / "bench_rap.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def row(bench, way, repairs, trained, kl, perplexity):
    shared = {
        "model": "m",
        "data": "d",
        "device": "cpu",
        "dtype": "float32",
        "torch": "2",
        "transformers": "5",
        "recover": "9",
        "rates": "0.001",
    }
    own = {"keep_ratio": "0.7", "way": way, "repairs": repairs, "trained": str(trained), "documents": "3", "exact_match": "0.5"}
    return shared | own | {"kl": str(kl), "kl_low": "0.1", "kl_high": "2", "perplexity": str(perplexity)}


def test_how_far_a_row_goes(bench):
    rows = [
        row(bench, "fisher / published", "", 0, 1.0, math.exp(4)),
        row(bench, "fisher / published", "", 1, 0.2, math.exp(3)),
        row(bench, "logit / sensitivity", "factors+values+outputs", 0, 0.4, math.exp(2.5)),
    ]
    found = bench.lines(rows)
    assert found[0] == "m, 3 documents of d, cpu, float32, torch 2, transformers 5, recovery of 9 steps at the best of 0.001"
    assert [line.split("|")[-2].strip() for line in found[-3:]] == ["0.00, 0.00", "1.00, 1.00", "0.75, 1.50"]
    assert [line.split("|")[3].strip() for line in found[-3:]] == ["-", "-", "all"]
    assert found[-2].split("|")[4].strip() == "yes"
    assert bench.lines(rows[:1])[-1].split("|")[-2].strip() == "-"  # nothing to compare with


def test_training_that_goes_no_way_is_no_measure(bench):
    """Less than a hundredth of what pruning costs: of a KL of 1, and of log perplexity that is 4 and 3.5 in the dense model."""
    dense = row(bench, "dense", "", 0, 0, math.exp(3.5)) | {"keep_ratio": "1"}
    ours = row(bench, "logit / sensitivity", "", 0, 0.5, math.exp(3.75))
    for kl, loss, shown in ((0.991, 3.9951, "-, -"), (0.98, 3.98, "25.00, 12.50"), (0.98, 3.9951, "25.00, -"), (1.2, 3.98, "-, 12.50")):
        ends = [row(bench, "fisher / published", "", 0, 1, math.exp(4)), row(bench, "fisher / published", "", 1, kl, math.exp(loss))]
        assert bench.lines([dense, *ends, ours])[-1].split("|")[-2].strip() == shown


def test_figures_of_one_document(bench):
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    from rotatek_compile.batches import Encoded
    from rotatek_compile.geometry import geometry_of

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    models = [LlamaForCausalLM(LlamaConfig(**sizes)).eval() for _ in range(2)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.mul_(40)
    ids = [3, 4, 5, 6]
    for _ in range(3):  # what the first model says itself, so that it is exact there
        ids.append(int(models[0](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    item = Encoded(SimpleNamespace(id="0", images=()), ids[:1], ids[1:], 0, {})
    judge = bench.Judge(models[0], [item], geometry_of(models[0].config), 0)
    logs = [model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1).detach() for model in models]
    targets = torch.tensor(ids[1:])[:, None]
    for number in (0, 1):
        found = judge(models[number])
        assert found.tokens == [6]
        assert found.kl[0] == pytest.approx(float((logs[0].exp() * (logs[0] - logs[number])).sum()), rel=1e-3, abs=1e-5)
        assert found.loss[0] == pytest.approx(-float(logs[number].gather(-1, targets).sum()), rel=1e-4)
        assert found.exact[0] == float((logs[number].argmax(-1) == targets[:, 0]).all())


def test_printed_from_a_file(bench, tmp_path, monkeypatch, capsys):
    rows = [row(bench, "fisher / published", "", n, 1.0 - n / 2, 30 - n) for n in (0, 1)]
    file = tmp_path / "rap.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(sys, "argv", ["bench_rap.py", "--print", str(file)])
    bench.main()
    assert capsys.readouterr().out.splitlines() == [*bench.lines(rows), ""]


def test_runs_over_single_ratios_are_put_together_with_one_dense_row(bench, tmp_path):
    def file(name, ratio, **changes):
        dense = row(bench, "dense", "", 0, 0, 5) | {"keep_ratio": "1.0", "num_samples": "8", "rates": "0.001"}
        pruned = row(bench, "fisher / published", "", 0, 1, 6) | {"keep_ratio": ratio, "num_samples": "8"}
        path = tmp_path / name
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(dense | changes))
            writer.writeheader()
            writer.writerows([dense | changes, pruned | changes])
        return path

    some = [file("a.csv", "0.6"), file("b.csv", "0.8")]
    assert [(r["keep_ratio"], r["way"]) for r in bench.merged(some)] == [
        ("1.0", "dense"),
        ("0.8", "fisher / published"),
        ("0.6", "fisher / published"),
    ]
    with pytest.raises(RotateKError, match="again"):
        bench.merged([*some, file("c.csv", "0.6")])
    with pytest.raises(RotateKError, match="not of the same run"):
        bench.merged([*some, file("d.csv", "0.7", device="gpu")])
    with pytest.raises(RotateKError, match="not of the same run"):
        bench.merged([*some, file("e.csv", "0.7", calib="others")])


def test_rows_are_added_to_an_older_run_that_they_repeat(bench, tmp_path):
    """A run of some rows, with columns that the older file lacks: it must repeat a row of each ratio, figure for figure."""
    repairs = "factors+values+outputs"

    def file(name, rows, **settings):
        path = tmp_path / name
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(settings | rows[0]))
            writer.writeheader()
            writer.writerows([settings | one for one in rows])
        return path

    dense = row(bench, "dense", "", 0, 0, 5) | {"keep_ratio": "1.0"}
    published, ours = row(bench, "fisher / published", "", 0, 1, 6), row(bench, "logit / sensitivity", repairs, 0, 0.25, 5.5)
    trained = row(bench, "fisher / published", "", 1, 0.5, 5.75)
    old = file("old.csv", [dense, published, row(bench, "logit / published", "", 0, 0.9, 6), ours])
    new = file("new.csv", [dense, published, trained], calib="mixed", seed="0")
    for files in ([old, new], [new, old]):
        found = bench.merged(files)
        ways = [(r["way"], r["trained"]) for r in found]
        assert ways[1:] == [
            ("fisher / published", "0"),
            ("logit / published", "0"),
            ("logit / sensitivity", "0"),
            ("fisher / published", "1"),
        ]
        assert [r.get("calib", "") for r in found if r["trained"] == "1"] == ["mixed"]
        assert bench.columns(found)[:2] == ["calib", "seed"] and len(bench.columns(found)) == len(dense) + 2
    off = file("off.csv", [dense, published | {"kl": "1.0000001"}, trained], calib="mixed", seed="0")
    alone = file("alone.csv", [dense, trained], calib="mixed", seed="0")
    seeded = file("seeded.csv", [dense, published, trained | {"trained": "2"}], calib="mixed", seed="1")
    for files in ([old, off], [old, alone], [old, new, seeded]):
        with pytest.raises(RotateKError, match="not of the same run"):
            bench.merged(files)
    with pytest.raises(RotateKError, match="rows that are new"):
        bench.merged([new, file("all.csv", [dense, trained], calib="mixed", seed="0")])
    with pytest.raises(RotateKError, match="rows that are new"):
        bench.merged([new, file("unproven.csv", [dense, ours], calib="mixed", seed="0")])  # nothing shows that it is the same run
    elsewhere = file("elsewhere.csv", [dense, published, trained | {"keep_ratio": "0.6"}], calib="mixed", seed="0")
    with pytest.raises(RotateKError, match="has ratio 0.7 again"):
        bench.merged([old, elsewhere])
