"""Text that every installation has, and the small text model: docstrings in order, files held out whole, a checkpoint that loads."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_training import library_text
from tiny_training.library_text import collect, docstrings, is_held_out

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""A module that says what it is for, at some length."""


class Thing:
    """A thing whose purpose is explained in forty characters or more."""

    def act(self):
        """Too short."""

    async def wait(self):
        """Waits until something has happened, which may take a long time."""


def act():
    x = "no docstring, but a text that is long enough to be taken for one"
'''


def test_docstrings_in_order(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(SOURCE)
    assert [text.split()[0] + text.split()[1] for text in docstrings(file)] == ["Amodule", "Athing", "Waitsuntil"]
    file.write_text("def broken(:\n")
    assert docstrings(file) == []
    file.write_bytes(b"\xff\xfe\x00")
    assert docstrings(file) == []


def test_paragraphs_stand_once_and_held_out_files_are_whole(tmp_path, monkeypatch):
    shared = "This paragraph is in every single file of this library."
    names = [f"f{n}" for n in range(60)]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f'"""{shared}\n\nWhat only the file called {name} says about itself."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Tests are left out, because they repeat the library."""\n')
    monkeypatch.setattr(library_text.sysconfig, "get_path", lambda which: str(tmp_path))
    found = collect(())
    texts = "\n".join([*found.training, *found.held_out])
    assert texts.count(shared) == 1 and "Tests are left out" not in texts
    for name in names:
        part = found.held_out if is_held_out(f"python/{name}.py") else found.training
        assert sum(f"called {name} says" in text for text in part) == 1
    assert found.held_out and len(found.training) > len(found.held_out)
    assert found.facts["files"] == [len(found.training), len(found.held_out)]
    assert collect((), workers=2).facts == found.facts


def test_train_save_and_load(tmp_path, monkeypatch):
    """On some docstrings of the standard library, two steps."""
    files = library_text._files
    monkeypatch.setattr(library_text, "_files", lambda packages: itertools.islice(files(packages), 60))
    monkeypatch.setattr(library_text, "HELD_OUT", 5)
    geometry = "hidden=32,layers=2,heads=2,kv_heads=1,feed_forward=32,vocabulary=400,rows=2,length=32"
    words = ["--small", "--seconds", "60", "--max-steps", "2", "--log-every", "0", "--workers", "1", "--geometry", geometry]
    places = ["--output", str(tmp_path / "model"), "--work", str(tmp_path / "work"), "--packages", "numpy", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_tiny_text.py", *words, *places])
    runpy.run_path(str(ROOT / "tools" / "train_tiny_text.py"), run_name="__main__")
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.head_dim == 64 and model.config.num_key_value_heads == 1
    result = json.loads((tmp_path / "work" / "result.json").read_text())
    assert 1 < result["held_out_perplexity"] < 2000 and result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["corpus"]["packages"].keys() == {"numpy"}
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Return the"}], return_dict=False)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "Return the"
    rows = [json.loads(line) for line in (tmp_path / "model" / "calibration.jsonl").read_text().splitlines()]
    assert rows and all(row["question"] and row["answer"] for row in rows)
    logits = model(input_ids=torch.tensor([ids])).logits
    assert math.isfinite(float(logits.detach().sum()))
    assert (tmp_path / "work" / "training_log.csv").read_text().splitlines()[0] == "seconds,step,tokens,loss,held_out"
