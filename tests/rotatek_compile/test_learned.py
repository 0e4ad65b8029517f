"""Learned files: what is written is read, and everything that is wrong with one is said before it is used."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.learned import KEY, load_all, load_learned, save_learned
from rotatek_compile.methods import Methods
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rivals.leank import lean_masks
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales, tensors_of

NAME = "leank-learned"
BASE = {"id": "org/model", "revision": "abc", "fingerprint": None}
CALIBRATION = {"data": "mixed", "num_samples": 4, "seed": 3}
RATIOS = (0.25, 0.5)


@pytest.fixture
def scales(tiny_geometry):
    generator = torch.Generator().manual_seed(0)
    shapes = {i: (tiny_geometry.layers[i].kv_heads, tiny_geometry.layers[i].head_dim) for i in tiny_geometry.compressible}

    def draw():
        return {i: torch.rand(shape, generator=generator) for i, shape in shapes.items()}

    return LearnedScales(draw(), {ratio: draw() for ratio in RATIOS})


@pytest.fixture
def write(tiny_geometry, scales, tmp_path):
    def made(file="learned.safetensors", **changes):
        facts = {"base_model": BASE, "geometry": tiny_geometry.to_json(), "calibration": CALIBRATION, "training": {"ratios": [*RATIOS]}}
        save_learned(tmp_path / file, NAME, tensors_of(scales), facts | changes)
        return tmp_path / file

    return made


def edited(file, tensors=None, about=None, metadata=None):
    """The file with some tensors (None: without) or facts replaced."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        said = json.loads(stored.metadata()[KEY])
    held = load_file(file) | (tensors or {})
    metadata = {KEY: json.dumps(said | (about or {}))} if metadata is None else metadata
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file, metadata)
    return file


def test_what_is_written_is_read(write, scales, tiny_geometry, tmp_path):
    file = write()
    assert [path.name for path in tmp_path.iterdir()] == ["learned.safetensors"]
    read = load_learned(file)
    assert (read.name, read.geometry, read.base_model, read.calibration) == (NAME, tiny_geometry, BASE, CALIBRATION)
    state = read.state()
    assert all(torch.equal(state.first[i], scales.first[i]) for i in tiny_geometry.compressible)
    assert all(torch.equal(state.second[r][i], scales.second[r][i]) for r in RATIOS for i in tiny_geometry.compressible)
    assert file.read_bytes() == write("again").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {"format": "pt"}}, "is no learned file: its metadata has no rotatek_learned"),
        ({"metadata": {KEY: "[1]"}}, "holds a list, expected an object"),
        ({"about": {"name": "int4"}}, "is for 'int4', which learns nothing; it must be one of leank-learned"),
        ({"about": {"training": None}}, "section training is None, expected an object"),
        ({"about": {"training": {"ratios": [0.25, 2]}}}, r"training.ratios is \[0.25, 2\], expected a list of shares"),
        ({"about": {"training": {"ratios": [0.25, 0.25]}}}, "one of them twice"),
        ({"about": {"training": {"ratios": [0.25]}}}, "holds tensor 'ratios.1.layers.0.scale', which the rival does not know"),
        ({"about": {"training": {"ratios": [0.25, 0.5, 1]}}}, "tensor ratios.2.layers.0.scale is missing; train it again"),
        ({"about": {"calibration": {"data": "mixed", "num_samples": 0, "seed": 0}}}, "calibration.num_samples is 0, expected"),
        ({"about": {"calibration": {"data": None, "num_samples": 1, "seed": 0}}}, "calibration.data is None, expected a name"),
        ({"about": {"base_model": {"id": "../x", "revision": None, "fingerprint": None}}}, "base_model.id is '../x', which is no Hub id"),
        ({"about": {"geometry": {}}}, "section geometry: model_type is None, expected a name; train it again"),
        ({"tensors": {"layers.1.scale": torch.full((2, 32), torch.nan)}}, "tensor layers.1.scale holds NaN or infinity"),
        ({"tensors": {"layers.1.scale": torch.zeros(2, 31)}}, r"tensor layers.1.scale has shape \[2, 31\], the model wants \[2, 32\]"),
        ({"tensors": {"layers.1.scale": torch.zeros(2, 32, dtype=torch.int32)}}, "tensor layers.1.scale is 'I32', expected float32"),
        ({"tensors": {"layers.1.scale": None}}, "tensor layers.1.scale is missing"),
    ],
)
def test_what_is_wrong_is_said(write, changes, words):
    file = edited(write(), **changes)
    with pytest.raises(UsageError, match=words) as said:
        load_learned(file)
    assert "compile" not in str(said.value) and str(file) in str(said.value)


def test_damage_is_said(write, tmp_path):
    file = write()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match="is damaged or truncated"):
        load_learned(file)
    with pytest.raises(UsageError, match="is no file; name one that a training script wrote"):
        load_learned(tmp_path / "none")


def test_nothing_unreadable_is_written(write, scales, tmp_path):
    scales.first[0][0, 0] = torch.inf
    with pytest.raises(UsageError, match=r"layers.0.scale holds NaN or infinity"):
        write()
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(write, make_artifact):
    artifact = make_artifact(8)
    artifact.base_model |= {"revision": "abc", "fingerprint": None}
    file = write()
    assert set(load_all((file,), artifact)) == {NAME}
    with pytest.raises(UsageError, match=f"and {re.escape(str(file))} are both for leank-learned"):
        load_all((file, file), artifact)
    artifact.base_model["revision"] = "abd"
    with pytest.raises(UsageError, match="was trained on weights of revision 'abc', the artifact's have 'abd'"):
        load_all((file,), artifact)
    other = artifact.geometry.to_json()
    other["visual_token_ids"] = [1]
    with pytest.raises(UsageError, match=r"does not belong to the artifact's model: image token ids \[\d+\] against \[1\]"):
        load_all((write(geometry=other),), artifact)


def test_makers_get_it(tiny, make_artifact, write, scales):
    artifact = make_artifact(8, kv_budget=0.625, levels=(Slabs(), Slabs(0, 0, 16)), key_bits="auto", value_bits="auto")
    artifact.tensors |= {f"layers.{i}.knockout": torch.tensor([0.1, 0.2]) for i in range(3)}
    for side in ("key", "value"):
        artifact.tensors |= {f"layers.{i}.{side}_sensitivity": torch.tensor([[1.0, 0.1]] * 2) for i in range(3)}
    with enable(tiny, artifact, backend="torch") as active:
        without, methods = Methods(active), Methods(active, learned={NAME: load_learned(write()).state()})
        with pytest.raises(UsageError, match="leank-learned needs what it learned by training; name the file with --learned"):
            without.chosen([NAME], (), (0.5,))
        assert without.rival_in_suite(NAME) == []
        (entry,) = methods.chosen([NAME], (), (0.5,))
        coder = entry.make().layers[0].coder
        assert not entry.calibrated and coder.name == NAME
        assert coder.masks == lean_masks(methods.artifact.geometry, 0.5, scales.second[0.5]) and entry.setting.endswith("of 192 channels")
        found = {axis: {e.method for e in methods.suite("proof") if e.axis == axis} for axis in ("kv", "keys", "keys+values4")}
        assert all(NAME in names for names in found.values())
        assert NAME in {e.method for e in methods.suite("rivals")} and NAME not in {e.method for e in without.suite("rivals")}
