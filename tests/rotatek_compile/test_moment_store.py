"""Saved moments: equal ones are equal files, damaged ones count as nothing, and a killed run's temporary files go."""

import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotatek_compile import calibrate
from rotatek_compile.cached_tensors import STALE_SECONDS
from rotatek_compile.calibrate import MomentStore
from rotatek_compile.moments import Moments


@pytest.fixture
def store(tmp_path):
    return MomentStore({"a": 1}, tmp_path)


def moments():
    generator = torch.Generator().manual_seed(0)
    sums = {f"{i}.visual.key_sum": torch.rand(2, 8, generator=generator, dtype=torch.float64) for i in range(30)}
    return Moments(sums, 3)


def test_equal_moments_are_equal_files(store, tmp_path):
    store.save(moments())
    first = store.file.read_bytes()
    for _ in range(5):
        store.save(moments())
        assert store.file.read_bytes() == first
    loaded = store.load()
    assert loaded.documents == 3 and all(torch.equal(value, loaded.sums[name]) for name, value in moments().sums.items())


def test_one_flipped_bit_counts_as_nothing(store):
    store.save(moments())
    data = bytearray(store.file.read_bytes())
    data[-5] ^= 4
    store.file.write_bytes(data)
    assert (store.load().documents, store.load().sums) == (0, {})


@pytest.mark.parametrize("facts", [None, {"moments": "3"}, {"moments": "4 {}"}, {"documents": "3"}, {"moments": "three {}"}])
def test_other_facts_count_as_nothing(store, facts):
    store.save(moments())
    checksum = calibrate._checksum(moments().sums, 3)
    save_file(load_file(store.file), store.file, metadata=facts and {k: v.format(checksum) for k, v in facts.items()})
    assert store.load().documents == 0
    save_file(load_file(store.file), store.file, metadata={"moments": f"3 {checksum}"})
    assert store.load().documents == 3


def test_other_versions_have_other_moments(tmp_path, monkeypatch):
    before = MomentStore({"a": 1}, tmp_path).file
    monkeypatch.setattr("rotatek_compile.artifact.library_versions", lambda: {"torch": "9.9"})
    assert MomentStore({"a": 1}, tmp_path).file != before
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "STORE_FORMAT", 99)
    assert MomentStore({"a": 1}, tmp_path).file != before
    monkeypatch.undo()
    assert MomentStore({"a": 1}, tmp_path).file == before


def test_temporary_files_of_killed_runs_go(store, tmp_path):
    old, young, foreign = (tmp_path / name for name in (f"{store.file.stem}.1.tmp", f"{store.file.stem}.2.tmp", "moments-other.1.tmp"))
    for file in (old, young, foreign):
        file.touch()
    long_ago = time.time() - 2 * STALE_SECONDS
    os.utime(old, (long_ago, long_ago))
    os.utime(foreign, (long_ago, long_ago))
    store.save(moments())
    assert sorted(tmp_path.iterdir()) == sorted([store.file, young, foreign])
