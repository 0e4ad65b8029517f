"""The reader believes nothing: every damaged artifact is refused with a sentence that names file, tensor or key, and value."""

import hashlib

import pytest
import torch
from artifact_edits import edit_config, edit_tensors, put, refused, with_entry

from rotatek_compile import RotateKError
from rotatek_compile.artifact import CONFIG_FILE, TENSOR_FILE, read_artifact, write_artifact
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.output import atomic_directory

ENCODE = "layers.1.visual.key_encode"


def test_round_trip(compiled, tmp_path):
    first = read_artifact(compiled)
    write_artifact(first, tmp_path, "card")
    second = read_artifact(tmp_path)
    assert (first.geometry, first.method, first.base_model) == (second.geometry, second.method, second.base_model)
    assert (first.calibration, first.report, first.libraries) == (second.calibration, second.report, second.libraries)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]) and tensor.dtype == second.tensors[name].dtype
    assert (tmp_path / TENSOR_FILE).read_bytes() == (compiled / TENSOR_FILE).read_bytes()
    assert (tmp_path / CONFIG_FILE).read_bytes() == (compiled / CONFIG_FILE).read_bytes()
    assert (tmp_path / "README.md").read_text() == "card"


def test_what_was_compiled(compiled):
    artifact = read_artifact(compiled)
    assert artifact.geometry.compressible == (0, 1, 2)
    heads = [head for heads in artifact.plan().values() for head in heads]
    assert sum(head.key.native for head in heads) == sum(head.key.rank for head in heads) == 6 * 32 // 4
    assert {head.value for head in heads} == {Slabs(32)}
    assert artifact.method.levels == (Slabs(), Slabs(nibble=16))
    assert all(artifact.sensitivity(side)[i].shape == (2, 2) for side in ("key", "value") for i in range(3))
    assert artifact.bytes_per_token() == 3 * 2 * 2 * 32 + 2 * 48
    assert artifact.calibration["num_samples"] == 4 and artifact.calibration["split"] == "local"
    for i in range(3):
        spectrum = artifact.tensors[f"layers.{i}.visual.key_spectrum"]
        assert (spectrum.diff(dim=-1) <= 1e-6 * spectrum[:, :1]).all()  # ordered by importance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=3), "format_version 3 is newer than 2; upgrade rotatek-compile"),
        (lambda c: c.update(format_version=0), "format_version is 0"),
        (lambda c: c.update(format_version="1"), "format_version is '1', not a whole number"),
        (lambda c: c.pop("format_version"), "format_version is None"),
        (lambda c: [c], "holds a list, expected an object"),
        (lambda c: c.pop("geometry") and None, "section geometry is missing"),
        (lambda c: c.update(geometry=[]), "section geometry is missing"),
        (lambda c: c["geometry"].pop("layers") and None, "section geometry: layers is None, expected a list of 1 to 1024"),
        (lambda c: c["geometry"].update(layers={"0": 1}), "layers is {'0': 1}, expected a list"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim="wide"), "layer 1 has head_dim 'wide', expected 1 to 1024"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim=float("inf")), "is not readable JSON (Infinity is no JSON number)"),
        (lambda c: c["geometry"]["layers"][1].update(kv_heads=0), "layer 1 has kv_heads 0, expected 1 to 4096"),
        (lambda c: c["geometry"]["layers"][1].update(kv_heads=3), "layer 1 has 4 query heads and 3 KV heads"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim=-8), "layer 1 has head_dim -8, expected 1 to 1024"),
        (lambda c: c["geometry"]["layers"][1].update(kv_heads=4), "layers.1.key_plan has shape [2, 3], the geometry wants [4, 3]"),
        (lambda c: [layer.update(layer_type="sliding_attention") for layer in c["geometry"]["layers"]] and None, "no full_attention layer"),
        (lambda c: c.pop("rotatek") and None, "section rotatek is missing"),
        (lambda c: c["rotatek"].update(basis="svd"), "basis is 'svd'"),
        (lambda c: c["rotatek"].update(basis=["pca"]), "basis is ['pca']"),
        (lambda c: c["rotatek"].update(span="some"), "span is 'some'"),
        (lambda c: c["rotatek"].update(key_bits="2"), "key_bits is '2', which this version cannot run"),
        (lambda c: c["rotatek"].update(value_bits=4), "value_bits is 4, which this version cannot run"),
        (lambda c: c["rotatek"].update(max_kl=-1), "max_kl is -1"),
        (lambda c: c["rotatek"].update(max_kl=True), "max_kl is True"),
        (lambda c: c["rotatek"].update(window=0), "window is 0"),
        (lambda c: c["rotatek"].update(window="128"), "window is '128'"),
        (lambda c: c["rotatek"].update(keep_ratio=float("nan")), "is not readable JSON (NaN is no JSON number)"),
        (lambda c: c["rotatek"].update(rival=3), "rival is 3"),
        (lambda c: c["rotatek"].update(kv_budget="half"), "kv_budget is 'half'"),
        (lambda c: c["rotatek"].update(kv_budget=0), "kv_budget is 0"),
        (lambda c: c["geometry"].update(position_axes=0), "position_axes is 0"),
        (lambda c: c["geometry"].update(position_axes="three"), "position_axes is 'three'"),
        (lambda c: c["rotatek"].update(keep_ratio="0.25"), "keep_ratio is '0.25'"),
        (lambda c: c["rotatek"].update(fallback_factor="8"), "fallback_factor is '8'"),
        (lambda c: c["rotatek"].update(levels=[8]), "levels is [8], expected a list of [native, 8-bit, 4-bit] directions"),
        (lambda c: c["rotatek"].update(levels=7), "levels is 7, expected a list of [native, 8-bit, 4-bit] directions"),
        (lambda c: c["rotatek"].update(levels=[[0, 0]]), "levels is [[0, 0]], expected a list"),
        (lambda c: c["rotatek"].update(levels=[[0, 0, 8]]), "levels is [[0, 0, 8]], expected a list"),
        (lambda c: c["rotatek"].update(levels=[[0, 0, 2048]]), "levels is [[0, 0, 2048]], expected a list"),
        (lambda c: c["rotatek"].update(levels=[[0, True, 0]]), "levels is [[0, True, 0]], expected a list"),
        (lambda c: c["rotatek"].update(levels=[[0, 0, 0]] * 65), "expected a list"),
        (lambda c: c["rotatek"].update(levels=[[0, 0, 0]]), "layers.0.key_sensitivity has shape [2, 2], the geometry wants [2, 1]"),
        (lambda c: c.pop("base_model") and None, "section base_model is missing"),
        (lambda c: c["base_model"].update(id=None), "base_model.id is None, expected text"),
        (lambda c: c["base_model"].update(revision=3), "base_model.revision is 3"),
        (lambda c: c["base_model"].update(revision="refs/pr/1"), "base_model.revision is 'refs/pr/1', which is no commit, branch or tag"),
        (lambda c: c["base_model"].update(revision="../main"), "base_model.revision is '../main'"),
        (
            lambda c: c["base_model"].update(id="../model", fingerprint=None),
            "base_model.id is '../model', which is no Hub id like org/name",
        ),
        (lambda c: c["base_model"].update(id="/model", fingerprint=None), "base_model.id is '/model', which is no Hub id like org/name"),
        (lambda c: c["base_model"].update(id="org/na..me", fingerprint=None), "which is no Hub id like org/name"),
        (lambda c: c["base_model"].update(id="/models/../../x"), "base_model.id is '/models/../../x', a path that goes up again"),
        (lambda c: c["base_model"].update(id="models/x"), "base_model.id is 'models/x', expected an absolute path"),
        (lambda c: c["base_model"].update(id=".."), "base_model.id is '..', expected an absolute path"),
        (lambda c: c["base_model"].update(id="x" * 600), "expected text"),
        (lambda c: c.update(tool="\x1b[2J"), "holds the text '\\x1b[2J' with control characters"),
        (lambda c: c.update(libraries=[1]), "section libraries is [1], expected an object"),
        (lambda c: c["geometry"].update(model_type=7), "model_type is 7"),
        (lambda c: c["geometry"].update(visual_token_ids=[2.5]), "visual_token_ids is [2.5], expected a list of token ids"),
        (lambda c: c["geometry"].update(layers=c["geometry"]["layers"] * 400), "expected a list of 1 to 1024"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim=True), "layer 1 has head_dim True, expected 1 to 1024"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim=32.5), "layer 1 has head_dim 32.5"),
        (lambda c: c["geometry"]["layers"][1].update(head_dim=12), "layer 1 has head_dim 12, which is no multiple of 8"),
        (lambda c: c["geometry"]["layers"][1].update(query_heads=10**9), "layer 1 has query_heads 1000000000, expected 1 to 4096"),
        (lambda c: c["geometry"]["layers"][1].update(layer_type=None), "layer 1 has layer_type None"),
        (lambda c: c["rotatek"].update(window=True), "window is True"),
        (lambda c: c["rotatek"].update(window=10**18), "window is 1000000000000000000"),
        (lambda c: c["rotatek"].update(keep_ratio=True), "keep_ratio is True"),
        (lambda c: c["rotatek"].update(prior_tokens=2.5), "prior_tokens is 2.5"),
        (lambda c: c["rotatek"].update(fallback_factor=1e300), "fallback_factor is 1e+300"),
        (lambda c: c.update(calibration=None), "section calibration is missing"),
        (lambda c: c.pop("files") and None, "section files is missing"),
        (lambda c: c.update(files={}), "was changed after it was written"),
        (lambda c: c.update(files={TENSOR_FILE: "sum"}), "was changed after it was written"),
    ],
)
def test_damaged_config(broken_artifact, change, words):
    def in_place(config):
        result = change(config)
        return result if isinstance(result, list) else None

    edit_config(broken_artifact, in_place)
    assert words in refused(broken_artifact)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'"text"'])
def test_config_that_is_no_object(broken_artifact, content):
    (broken_artifact / CONFIG_FILE).write_bytes(content)
    words = refused(broken_artifact)
    assert "is not readable JSON" in words or "expected an object" in words


def test_twice_the_same_key(broken_artifact):
    file = broken_artifact / CONFIG_FILE
    file.write_text(file.read_text().replace('"window"', '"window": 64, "window"'))
    assert "key 'window' stands twice in one object" in refused(broken_artifact)


def test_geometry_that_calls_for_too_much(broken_artifact):
    """Refused before anything of that size is read or made."""
    edit_config(broken_artifact, lambda c: [layer.update(query_heads=4096, kv_heads=4096) for layer in c["geometry"]["layers"]] and None)
    edit_config(broken_artifact, lambda c: [layer.update(head_dim=1024) for layer in c["geometry"]["layers"]] and None)
    assert "the geometry calls for 103" in refused(broken_artifact)


def test_more_tensors_than_the_geometry_calls_for(broken_artifact):
    edit_tensors(broken_artifact, lambda tensors: tensors.update(extra=torch.zeros(4 << 20)))
    assert f"{TENSOR_FILE} has " in refused(broken_artifact) and " bytes, at most " in refused(broken_artifact)


def test_unknown_tensors_are_left_out_with_a_warning(broken_artifact):
    edit_tensors(broken_artifact, lambda tensors: tensors.update({"../extra": torch.zeros(1)}))
    with pytest.warns(UserWarning, match="ignoring unknown tensors ../extra"):
        assert "../extra" not in read_artifact(broken_artifact).tensors


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"shape":[2,32,32]', '"shape":[2,32,99]', "has shape [2, 32, 99], the geometry wants [2, 32, 32]"),
        ('"dtype":"F32"', '"dtype":"F64"', "is float64, expected float32"),
        ('"data_offsets":[0,', '"data_offsets":[8,', "is damaged or truncated"),
        ('"shape":[2,32,32]', '"shape":[2,32,32],"shape":[2,32,32]', "key 'shape' stands twice"),
        ('"data_offsets"', '"data_offset_"', "is damaged or truncated (tensor "),
    ],
)
def test_damaged_header(broken_artifact, old, new, words):
    file = broken_artifact / TENSOR_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length].decode()
    assert old in head
    head = head.replace(old, new).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_config(broken_artifact, lambda config: config["files"][TENSOR_FILE].update(sha256=digest))
    assert words in refused(broken_artifact)


@pytest.mark.parametrize("scale", [1e-35, 1e33])
def test_basis_beyond_float32(broken_artifact, scale):
    edit_tensors(broken_artifact, put(ENCODE, lambda t: torch.eye(32).repeat(2, 1, 1) * scale))
    assert f"tensor {ENCODE} is not safely invertible (singular values up to 1e+3" in refused(broken_artifact)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE, "report.json"])
def test_links_out_of_the_directory(broken_artifact, tmp_path, name):
    (broken_artifact / name).rename(tmp_path / "elsewhere")
    (broken_artifact / name).symlink_to("../elsewhere")
    assert f"{name} is a link to " in refused(broken_artifact) and "outside the artifact" in refused(broken_artifact)


def test_what_does_not_pass_is_not_written(compiled, tmp_path):
    artifact = read_artifact(compiled)
    artifact.tensors[ENCODE][0, 3, 5] = float("nan")
    with pytest.raises(RotateKError) as error:
        write_artifact(artifact, tmp_path, "card")
    said = f"the artifact does not pass its own checks and was not written: {TENSOR_FILE}: tensor {ENCODE} holds NaN or infinity"
    assert str(error.value).startswith(said)
    artifact = read_artifact(compiled)
    artifact.report["plan_kl"] = float("nan")
    with pytest.raises(RotateKError, match="was not written: report.json is not readable JSON .NaN is no JSON number"):
        write_artifact(artifact, tmp_path, "card")


def test_names_of_data_that_no_terminal_should_see(compiled, tmp_path):
    """A data set may lie in a folder of any name; what is recorded of it can be printed."""
    artifact = read_artifact(compiled)
    artifact.calibration["data"] = "/data/a\x1b[2Jb\udcff"
    write_artifact(artifact, tmp_path, "card")
    assert read_artifact(tmp_path).calibration["data"] == "/data/a?[2Jb?"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(ENCODE, with_entry((0, 3, 5), float("nan"))), f"tensor {ENCODE} holds NaN or infinity"),
        (put("layers.0.visual.key_mean", with_entry((0, 0), float("inf"))), "layers.0.visual.key_mean holds NaN or infinity"),
        (put("layers.2.key_sensitivity", with_entry((0, 0), float("nan"))), "layers.2.key_sensitivity holds NaN or infinity"),
        (put("layers.2.value_sensitivity", with_entry((0, 0), float("inf"))), "layers.2.value_sensitivity holds NaN or infinity"),
        (lambda tensors: tensors.pop("layers.1.value_sensitivity"), "tensor layers.1.value_sensitivity is missing"),
        (put(ENCODE, with_entry((1, slice(None), 4), 0.0)), f"tensor {ENCODE} is not safely invertible"),
        (put(ENCODE, torch.zeros_like), f"tensor {ENCODE} is not safely invertible"),
        (put(ENCODE, lambda t: torch.diag(torch.logspace(0, 5, 32)).expand(2, 32, 32)), "(condition 1e+05 > 1e4)"),
        (put("layers.1.visual.value_spectrum", torch.neg), "layers.1.visual.value_spectrum has a negative entry"),
        (put("layers.1.key_plan", with_entry((0, 0), 12)), "tensor layers.1.key_plan: slabs (12, 0, 0) (native, 8 bit, 4 bit) must be"),
        (put("layers.1.key_plan", with_entry(0, torch.tensor([0, 40, 0]))), "layers.1.key_plan: slabs (0, 40, 0)"),
        (put("layers.1.key_plan", with_entry((1, 1), -8)), "multiples of 8, 8 and 16, zero included, of at most 32 directions together"),
        (put("layers.1.value_plan", with_entry((0, 2), 8)), "layers.1.value_plan: slabs (32, 0, 8)"),
        (put("layers.1.value_plan", with_entry((0, 2), 16)), "layers.1.value_plan: slabs (32, 0, 16)"),
        (put("layers.1.value_plan", lambda t: t[:, :2]), "tensor layers.1.value_plan has shape [2, 2], the geometry wants [2, 3]"),
        (put("layers.1.key_plan", torch.Tensor.float), "layers.1.key_plan is float32, expected int32"),
        (put(ENCODE, torch.Tensor.bfloat16), f"tensor {ENCODE} is bfloat16, expected float16"),
        (put(ENCODE, lambda t: t.to(torch.float8_e4m3fn)), f"tensor {ENCODE} is 'F8_E4M3', expected float16"),
        (put(ENCODE, lambda t: t[:, :, :-1]), f"tensor {ENCODE} has shape [2, 32, 31], the geometry wants [2, 32, 32]"),
        (put("layers.1.knockout", with_entry(0, float("nan"))), "layers.1.knockout holds NaN or infinity"),
        (put("layers.1.knockout", with_entry(1, -0.5)), "layers.1.knockout has a negative entry (-0.5)"),
        (put("layers.1.knockout", lambda t: t[:1]), "layers.1.knockout has shape [1], the geometry wants [2]"),
        (put("layers.1.knockout", torch.Tensor.double), "layers.1.knockout is float64, expected float32"),
        (lambda tensors: tensors.pop("layers.1.knockout"), "tensor layers.1.knockout is missing"),
        (lambda tensors: tensors.pop(ENCODE), f"tensor {ENCODE} is missing"),
        (lambda tensors: tensors.clear() or tensors.update(other=torch.zeros(1)), "tensor layers.0.key_plan is missing"),
    ],
)
def test_damaged_tensors(broken_artifact, change, words):
    edit_tensors(broken_artifact, change)
    said = refused(broken_artifact)
    assert words in said and said.endswith("; compile the artifact again")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * 8 + data[8:], lambda data: b"text"]
)
def test_truncated_file(broken_artifact, damage):
    file = broken_artifact / TENSOR_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} is damaged or truncated" in refused(broken_artifact)


def test_one_flipped_bit(broken_artifact):
    file = broken_artifact / TENSOR_FILE
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert "was changed after it was written: sha256 " in refused(broken_artifact)


def test_missing_files(broken_artifact, tmp_path):
    (broken_artifact / TENSOR_FILE).unlink()
    assert f"is incomplete: it has no {TENSOR_FILE}" in refused(broken_artifact)
    (broken_artifact / CONFIG_FILE).unlink()
    assert f"is no artifact: it has no {CONFIG_FILE}" in refused(broken_artifact)
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_unknown_keys_are_ignored_with_a_warning(broken_artifact):
    edit_config(broken_artifact, lambda c: c.update(mood="good") or c["rotatek"].update(color="red"))
    with pytest.warns(UserWarning) as seen:
        artifact = read_artifact(broken_artifact)
    assert artifact.method.keep_ratio == 0.25
    assert [word for w in seen for word in ("mood", "color") if f"ignoring unknown keys {word}" in str(w.message)] == ["mood", "color"]


def test_old_artifact_survives_a_failed_rename(broken_artifact, monkeypatch, tmp_path, untouched):
    from pathlib import Path

    from rotatek_compile import RotateKError

    replace = Path.replace

    def failing(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(RotateKError, match="could not write .*Input/output error"), atomic_directory(broken_artifact, True) as staging:
        (staging / "file").touch()
    read_artifact(broken_artifact)
    untouched(tmp_path, "artifact")
