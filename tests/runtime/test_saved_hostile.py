"""A file that is not what was saved is refused in one sentence, never a crash; what passes for one decodes to finite numbers."""

import json
import os
import random
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))

from saved_cases import MIXED, NOTHING, go_on  # noqa: E402

from rotatek_compile.errors import RotateKError
from rotatek_compile.kernels.table import FIELDS, KIND, own_basis
from rotatek_compile.runtime import saved
from rotatek_compile.runtime.document import Document, load_document
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.saved import load_cache, save_cache
from rotatek_compile.runtime.saved_identity import with_sum

pytestmark = pytest.mark.filterwarnings("ignore:the Keys of these images lie")


@pytest.fixture(scope="module")
def store(model, prompts, make_artifact, tmp_path_factory):
    """The artifact of a cache with every kind of part, and its file."""
    artifact = make_artifact(plan=MIXED, span="all", prior_tokens=1, fallback=8.0, window=8)
    file = tmp_path_factory.mktemp("saved") / "cache.rtk"
    with torch.no_grad(), enable(model, artifact, backend="torch"):
        document = Document.read(model, **prompts.batch([[3, prompts.tall, 8], [30]]))
        go_on(model, document.cache, document.mask, (70, 70, 70))
        document.mask = torch.cat([document.mask, document.mask.new_ones(2, 210)], 1)
        document.save(file)
    return artifact, file


def parts(file):
    """Tensors and the JSON of a file."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return load_file(file), json.loads(header["__metadata__"][saved.KEY].partition(" ")[2])


def written(tensors, described, file):
    """A file that says this, its checksum recorded anew."""
    text = json.dumps(described)
    save_file(tensors, file, metadata={saved.KEY: with_sum(text, tensors)})
    return file


def refusal(file, model, enabled):
    """The one sentence, or None for a file that is read; then decoding on it gives finite logits."""
    try:
        document = load_document(file, model)
    except RotateKError as error:
        words = str(error)
        assert words.isprintable() and len(words) < 1000 and str(file) in words, words
        return words
    assert torch.isfinite(go_on(model, document.cache, document.mask, (1, 70))).all()
    return None


def test_the_file_is_read_as_it_is(model, store, tmp_path):
    artifact, file = store
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        assert refusal(file, model, enabled) is None
        assert refusal(written(*parts(file), tmp_path / "again"), model, enabled) is None


def test_damaged_files(model, store, tmp_path):
    """Cuts, flipped bits, bytes put in: nothing of it is read."""
    artifact, file = store
    data, chance = file.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        damaged = tmp_path / "damaged"
        for case in range(160):
            place = chance.randrange(8) if case % 8 == 0 else chance.randrange(header) if case % 2 else chance.randrange(len(data))
            if case % 5 == 0:
                content = data[:place]
            elif case % 5 == 1:
                content = data[:place] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20))) + data[place:]
            else:
                content = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            damaged.write_bytes(content)
            assert refusal(damaged, model, enabled) is not None, f"case {case}, byte {place}"


CACHES = [b"3", b'"x {"', b'"x [1]"', b'"x {}"', b'"{}"', rb'"x {\"format_version\": 3}"', rb'"x {\"format_version\": true}"']
METADATA = [b"3", *(b'{"rotatek_cache": %s}' % value for value in CACHES)]
HEADERS = [b"", b"{}", b"[]", b"null", b"[" * 5000, b'{"a": 1, "a": 1}', *(b'{"__metadata__": %s}' % value for value in METADATA)]


def test_hostile_headers(model, store, tmp_path):
    artifact, _ = store
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        file = tmp_path / "hostile"
        for header in HEADERS:
            for length in (len(header), len(header) + 1, 1 << 62):
                file.write_bytes(struct.pack("<Q", length) + header)
                assert refusal(file, model, enabled) is not None
        for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: None):
            file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
            make(file)
            assert refusal(file, model, enabled) is not None
        with pytest.raises(RotateKError, match="cannot be read"):
            load_document("with\0nul", model)


def test_hostile_tables(model, store, tmp_path):
    """Every field of a segment at values that point out of its pool, or to what is not there."""
    artifact, file = store
    tensors, described = parts(file)
    table = tensors["layers.1.table"]
    spots = [tuple(spot) for spot in table[..., KIND].nonzero()]
    chance, refused, read = random.Random(1), 0, []
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        for field in range(FIELDS):
            for value in (-1, -7, own_basis(8), own_basis(1 << 40), 3, 8, 1 << 20, (1 << 63) - 1, -(1 << 63)):
                row, head, place = chance.choice(spots)
                changed = table.clone()
                if int(changed[row, head, place, field]) == value:
                    continue
                changed[row, head, place, field] = value
                words = refusal(written(tensors | {"layers.1.table": changed}, described, tmp_path / "table"), model, enabled)
                refused += words is not None
                if words is None:
                    read.append((field, value))
                else:
                    assert "layer 1" in words
    assert refused > 150, refused
    assert len(read) < 12 and all(value in (3, 8, -1, own_basis(8)) for _, value in read), (
        read
    )  # a place in the pool that is as good as the right one


def changes(tensors, described):
    """(what, tensors, JSON) of further lies."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if name.startswith("layers.0"):
            yield f"{name} missing", {k: v for k, v in tensors.items() if k != name}, described
            yield f"{name} wider", tensors | {name: torch.cat([tensor, tensor[:1]])}, described
            other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
            yield f"{name} of another dtype", tensors | {name: tensor.to(other)}, described
            if tensor.is_floating_point() and tensor.numel():
                broken = tensor.clone()
                broken.view(-1)[-1] = float("nan")
                yield f"{name} not finite", tensors | {name: broken}, described
            if tensor.dim() > 1 and tensor.shape[0] != tensor.shape[1]:
                yield f"{name} turned", tensors | {name: tensor.transpose(0, 1).contiguous()}, described
            if tensor.dtype == torch.int64:
                for value in (-3, 1 << 60):
                    broken = tensor.clone()
                    broken.view(-1)[0] = value
                    yield f"{name} holds {value}", tensors | {name: broken}, described
    yield "a tensor more", tensors | {"other": torch.zeros(1)}, described
    for key in described:
        if key == "tool":
            continue
        yield f"no {key}", tensors, {k: v for k, v in described.items() if k != key}
        for value in (-1, 1.5, True, "x" * 2000, [], [[]], {"a": 1}, 1 << 62):
            yield f"{key} {value!r:.20}", tensors, described | {key: value}
    first = described["layers"]["0"]
    for key in first:
        for value in (-1, [1], [{}], [[99, 0]]):
            yield f"layer {key} {value!r}", tensors, described | {"layers": described["layers"] | {"0": first | {key: value}}}
    writing = first["blocks"][0]
    for key in writing:
        for value in (-1, 99, [1], [{}, {}], None):
            yield (
                f"blocks {key} {value!r}",
                tensors,
                described | {"layers": described["layers"] | {"0": first | {"blocks": [writing | {key: value}]}}},
            )


def test_other_lies(model, store, tmp_path):
    artifact, file = store
    tensors, described = parts(file)
    assert described["layers"]["0"]["blocks"][0]["sides"] is not None, "some text has coordinates of its own"
    harmless = {"weights": (), "opened": (), "last_id": ()}
    read, count = [], 0
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        for what, lied, words in changes(tensors, described):
            count += 1
            if refusal(written(lied, words, tmp_path / "lie"), model, enabled) is None:
                read.append(what)
    assert count > 200
    assert all(any(key in what for key in (*harmless, "calibrated", "tail", "budgeted", "monitor")) for what in read), read


def test_blocks_in_calibrated_coordinates_have_the_slabs_of_the_plan(model, prompts, make_artifact, tmp_path):
    """More directions than are written would be read from behind the codes of a block."""
    with torch.no_grad(), enable(model, make_artifact(plan=MIXED, span="all", window=8), backend="torch") as enabled:
        document = Document.read(model, **prompts.batch([[30]]))
        go_on(model, document.cache, document.mask, (16,) * 6)
        document.mask = torch.cat([document.mask, document.mask.new_ones(1, 96)], 1)
        document.save(tmp_path / "cache")
        tensors, described = parts(tmp_path / "cache")
        name = "layers.0.blocks.0.value.fields"
        assert described["layers"]["0"]["blocks"][0]["sides"] is None and tensors[name][0, 1:4].tolist() == [0, 16, 0]
        assert refusal(tmp_path / "cache", model, enabled) is None
        tensors[name][0, 2] = 32
        words = refusal(written(tensors, described, tmp_path / "lie"), model, enabled)
        assert words is not None and "has the slabs [0, 32, 0] where [0, 16, 0] are kept" in words


def test_another_artifact_plan_or_model(model, store, make_model, make_artifact):
    artifact, file = store
    plan = make_artifact(plan=NOTHING, span="all", prior_tokens=1, fallback=8.0, window=8)
    means = replace(artifact, tensors={k: v + 1 if k.endswith("_mean") else v for k, v in artifact.tensors.items()})
    method = replace(artifact, method=replace(artifact.method, window=16))
    with torch.no_grad():
        for other, words in ((plan, "another plan"), (means, "another calibration"), (method, "another method")):
            with enable(model, other, backend="torch") as enabled:
                assert f"compressed with another artifact or budget ({words})" in refusal(file, model, enabled)
        with enable(model, artifact, backend="torch", fallback=False) as enabled:
            assert "another method" in refusal(file, model, enabled)
        for other, words in ((make_model(1), "other weights"), (make_model().double(), "other weights")):
            with enable(other, artifact, backend="torch") as enabled:
                assert words in refusal(file, other, enabled)
        with pytest.raises(RotateKError, match="no artifact is enabled"):
            load_document(file, model)


def test_a_bare_cache_of_another_dtype(model, prompts, make_model, make_artifact, tmp_path):
    """Without the model's weights recorded, dtype and artifact are what is compared."""
    with torch.no_grad():
        with enable(model, make_artifact(16), backend="torch") as enabled:
            cache = enabled.new_cache()
            model(**prompts.batch([[3, prompts.square, 4]]), past_key_values=cache)
            file = save_cache(cache, tmp_path / "cache")
            with pytest.raises(RotateKError, match="may be a bare cache, for load_cache"):
                load_document(file, model)
        double = make_model().double()
        with enable(double, make_artifact(16), backend="torch") as enabled, pytest.raises(RotateKError, match="load the model in float32"):
            load_cache(file, enabled)
