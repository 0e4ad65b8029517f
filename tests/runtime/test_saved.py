"""A saved cache is the cache: same logits to the last bit, in this process and in another one. What cannot be saved says why."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

sys.path.append(str(Path(__file__).parent))

from saved_cases import MIXED, NOTHING, go_on  # noqa: E402

from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.runtime import merging
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.document import Document
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.saved import load_cache
from rotatek_compile.runtime.saved_identity import identity

pytestmark = pytest.mark.filterwarnings("ignore:the Keys of these images lie")
SETTINGS = {
    "visual": {"ranks": 16, "prior_tokens": 256},
    "raw": {},
    "own bases": {"plan": MIXED, "prior_tokens": 1},
    "text too": {"plan": MIXED, "span": "all", "prior_tokens": 4, "fallback": 8.0},
    "no text fallback": {"plan": MIXED, "span": "all", "prior_tokens": 4},
    "budget": {"plan": NOTHING, "span": "all", "prior_tokens": 1, "kv_budget": 0.3, "fallback": 4.0},
    "escape tokens": {"plan": MIXED, "prior_tokens": 4, "escape_ratio": 0.05},
    "paper": {"ranks": 16, "basis": "paper"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_loaded_cache_is_the_saved_one(model, ragged, make_artifact, monkeypatch, tmp_path, setting):
    monkeypatch.setattr(merging, "MERGE_AT", 3)
    with torch.no_grad(), enable(model, make_artifact(**SETTINGS[setting]), backend="torch") as enabled:
        document = Document.read(model, **ragged)
        for again in range(2):  # as it was read, then with old text coded and merged
            cache, mask = document.cache, document.mask
            file = cache.save(tmp_path / f"{again}.rtk")
            loaded, _ = load_cache(file, enabled)
            assert loaded.tokens() == cache.tokens() and loaded.stats() == cache.stats()
            assert cache_bytes(loaded).span == cache_bytes(cache).span
            assert torch.equal(go_on(model, loaded, mask), expected := go_on(model, cache.fork(), mask))
            assert expected.std() > 0.5
            go_on(model, cache, mask)
            document.mask = torch.cat([mask, mask.new_ones(len(mask), cache.get_seq_length() - mask.shape[1])], 1)
        if setting == "text too":
            assert any(layer.blocks.opened for layer in cache.layers)
            assert any(side.own for layer in cache.layers for now in layer.blocks.rows.values() for side in now.where)
        if setting == "own bases":
            assert any(layer.store.own_bases.numel() for layer in cache.layers)


def test_images_that_come_after_loading(model, prompts, make_artifact, tmp_path):
    """A budget that has no room for parts of their own: they take those of the first image, which the file must name."""
    more = prompts.batch([[2, prompts.wide, 3, prompts.square, 20]], seeds=[9], pixels=[7, 8])
    with torch.no_grad(), enable(model, make_artifact(plan=MIXED, kv_budget=0.4), backend="torch") as enabled:
        document = Document.read(model, **prompts.batch([[3, prompts.square, 5, prompts.tall]]))
        assert document.cache.layers[0].store.budgeted[0, 1] == 1 and document.cache.layers[0].store.first
        mask = torch.cat([document.mask, more["attention_mask"]], 1)
        places = (mask.cumsum(-1) - 1)[:, document.mask.shape[1] :]
        loaded, _ = load_cache(document.cache.save(tmp_path / "cache"), enabled)
        call = more | {"attention_mask": mask, "position_ids": places}
        got, expected = (model(**call, past_key_values=one).logits for one in (loaded, document.cache))
        assert torch.equal(got, expected)
        got, expected = (go_on(model, one, mask, (1, 70)) for one in (loaded, document.cache))
        assert torch.equal(got, expected)
        assert loaded.layers[0].store.budgeted.tolist() == document.cache.layers[0].store.budgeted.tolist()


def test_rows_that_share_segments_go_on_sharing_them(model, prompts, make_artifact, tmp_path):
    with torch.no_grad(), enable(model, make_artifact(plan=MIXED, span="all"), backend="torch") as enabled:
        document = Document.read(model, **prompts.batch([[3, prompts.square, 140]]))
        document.cache.batch_repeat_interleave(3)
        mask = document.mask.expand(3, -1)
        loaded, _ = load_cache(document.cache.save(tmp_path / "beams"), enabled)
        assert cache_bytes(loaded).total == cache_bytes(document.cache).total
        assert torch.equal(go_on(model, loaded, mask), go_on(model, document.cache, mask))


def test_in_another_process(model, ragged, make_artifact, tmp_path):
    """Nothing of this process is needed: the same numbers come out of one that has only the file, the artifact and the weights."""
    artifact = make_artifact(plan=MIXED, span="all", prior_tokens=4, fallback=8.0)
    with torch.no_grad(), enable(model, artifact, backend="torch"):
        document = Document.read(model, **ragged)
        document.save(tmp_path / "document")
        expected = document.generate(torch.full((4, 3), 17), max_new_tokens=5, do_sample=False, eos_token_id=-1)
        logits = go_on(model, document.cache, document.mask)
    torch.save(artifact, tmp_path / "artifact.pt")
    script = f"""
import importlib.util, sys, torch
from pathlib import Path
for name, file in (("conftest", {str(Path(__file__).parent / "conftest.py")!r}), ("test_saved", {__file__!r})):
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from rotatek_compile.runtime.document import load_document
from rotatek_compile.runtime.enable import enable
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
model = sys.modules["conftest"].build_model()
with torch.no_grad(), enable(model, torch.load(folder / "artifact.pt", weights_only=False), backend="torch"):
    document = load_document(folder / "document", model)
    tokens = document.generate(torch.full((4, 3), 17), max_new_tokens=5, do_sample=False, eos_token_id=-1)
    torch.save((tokens, sys.modules["test_saved"].go_on(model, document.cache, document.mask)), folder / "answers.pt")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    tokens, there = torch.load(tmp_path / "answers.pt")
    assert torch.equal(tokens, expected) and torch.equal(there, logits)


def test_all_state_is_known(model, ragged, make_artifact):
    """What the store, the layer or the blocks come to keep must be written by saved_layer.py, and then be named here."""
    with torch.no_grad(), enable(model, make_artifact(plan=MIXED, span="all", window=8), backend="torch"):
        document = Document.read(model, **ragged)
        go_on(model, document.cache, document.mask, (9, 70, 70))
    cache = document.cache
    layer = cache.layers[0]
    assert set(vars(layer)) - set(vars(DynamicLayer())) == {
        "index", "artifact", "state", "backend", "coder", "logical_length", "real", "tail", "segments", "media", "blocks",
        "prepared",
    }  # fmt: skip
    assert {name: getattr(layer.media, name) for name in vars(layer.media)} == {  # caches that hold an image or drop tokens are not saved
        "index": layer.index, "segments": layer.segments, "coder": None, "spans": None, "kept": None, "queries": {}, "before": {},
    }  # fmt: skip
    assert {name: getattr(layer.segments, name) for name in vars(layer.segments)} == {  # nothing is under way between calls
        "store": layer.store, "prepared": layer.prepared, "begun": [], "_seen": [], "_figures": None,
    }  # fmt: skip
    assert set(vars(layer.store)) == {
        "heads", "dim", "dtype", "device", "prepared", "codes", "scales", "own_means", "own_bases", "table", "ids", "table_on_device",
        "monitor", "budgeted", "held", "window", "written_in", "first", "calibrated", "_last_id", "_pending", "_end", "_released", "_view",
        "_plan", "_views", "selected",  # views are made anew; counts are of this process
    }  # fmt: skip
    assert set(vars(layer.store.window)) == {"buffer", "lengths", "host"}
    assert set(vars(layer.blocks)) == {"store", "basis", "rules", "shared", "rows", "opened"}
    written = next(iter(layer.blocks.rows.values()))
    assert set(written.__slots__) == {"where", "fields", "scales", "discarded", "tokens"}
    assert set(written.where[0].__slots__) == {
        "slabs", "encode", "centre", "scales", "calibrated_scales", "own_mean", "own", "fallback", "error", "expected", "kept",
        "given", "planned",  # looked at when coordinates are opened, not afterwards, so not written
    }  # fmt: skip
    assert set(layer.store.monitor.__slots__) == {"ratio", "angle", "fallback", "deviation"}
    own = {name for name in vars(cache) if name not in vars(DynamicCache()) and not name.startswith("_")}
    assert own == {"state", "artifact", "drift_said", "rope_deltas", "weights"}


# -- what is not saved ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_saved(model, prompts, make_artifact, exact_coder, tmp_path):
    inputs, file = prompts.batch([[3, prompts.square, 4]]), tmp_path / "cache"
    with torch.no_grad(), enable(model, make_artifact(16), backend="torch") as enabled:
        with pytest.raises(RotateKError, match="holds no tokens"):
            enabled.new_cache().save(file)
        rival = enabled.new_cache(exact_coder)
        model(**inputs, past_key_values=rival)
        with pytest.raises(RotateKError, match="rival method exact cannot be saved"):
            rival.save(file)
        middle = enabled.new_cache()
        model(
            **dict(inputs, input_ids=inputs["input_ids"][:, :91], attention_mask=inputs["attention_mask"][:, :91]), past_key_values=middle
        )
        middle.state._open = {0: 1}
        with pytest.raises(RotateKError, match="in the middle of an image"):
            middle.save(file)
        middle.finish()
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
        cache.layers[1].logical_length += 1
        with pytest.raises(RotateKError, match="did not finish"):
            cache.save(file)
        assert not list(tmp_path.iterdir())
        middle.save(file)
        before = file.read_bytes()
        with pytest.raises(UsageError, match="exists; pass overwrite=True"):
            middle.save(file)
        middle.save(file, overwrite=True)
        assert file.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("setting", [{}, {"plan": MIXED, "span": "all"}])
def test_an_image_that_was_held_is_coded_by_finish(model, prompts, make_artifact, setting):
    """A call that ends with an image whose length nobody told holds it raw; `finish` says that it is complete."""
    from rotatek_compile.runtime.media import CallState

    inputs = prompts.batch([[3, prompts.square]])
    with torch.no_grad(), enable(model, make_artifact(**setting), backend="torch") as enabled, pytest.MonkeyPatch.context() as patch:
        told = enabled.new_cache()
        model(**inputs, past_key_values=told)
        patch.setattr(CallState, "announce", lambda *_: None)
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
        assert cache.unfinished() and not told.unfinished()
        before, after = cache.fork(), cache.fork()
        after.finish()
        assert not after.unfinished() and cache_bytes(after).span == cache_bytes(told).span
        ids = torch.full((1, 2), 17)
        expected = model(input_ids=ids, past_key_values=before).logits  # text ends the image
        assert torch.equal(model(input_ids=ids, past_key_values=after).logits, expected)


def test_nothing_half_written_stays(model, prompts, make_artifact, monkeypatch, tmp_path):
    import safetensors.torch
    from safetensors import SafetensorError

    with torch.no_grad(), enable(model, make_artifact(16), backend="torch"):
        document = Document.read(model, **prompts.batch([[3, prompts.square, 4]]))
    file = document.save(tmp_path / "document")
    before = file.read_bytes()

    def half(tensors, name, metadata):
        Path(name).write_bytes(before[: len(before) // 2])
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name, fault in ((safetensors.torch, "save_file", half), (os, "fsync", full), (Path, "replace", full)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            for target in (file, tmp_path / "new"):
                with pytest.raises(RotateKError, match="could not write .*No space left.*free space"):
                    document.save(target, overwrite=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["document"] and file.read_bytes() == before
    with pytest.raises(RotateKError, match="there is no folder .*no; make it first"):
        document.save(tmp_path / "no" / "folder")


def test_what_a_plan_was_made_of_is_no_part_of_what_codes_mean(make_artifact):
    """Documents saved before `image_tokens` was recorded are read."""
    artifact = make_artifact(plan=MIXED)
    other = replace(artifact, method=replace(artifact.method, image_tokens=77))
    assert identity(other) == identity(artifact) != identity(replace(artifact, method=replace(artifact.method, escape_ratio=0.1)))


def test_documents_saved_before_there_was_token_selection_are_read(make_artifact):
    artifact = make_artifact(plan=MIXED)
    since = ("token_method", "token_keep_ratio", "token_budget")  # fields of `Method` that older documents do not know
    before = {name: value for name, value in asdict(artifact.method).items() if name not in (*since, "levels", "image_tokens")}
    assert identity(artifact)["method"] == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    selecting = replace(artifact.method, token_method="fastv", token_keep_ratio=0.5)
    assert identity(replace(artifact, method=selecting))["method"] != identity(artifact)["method"]
