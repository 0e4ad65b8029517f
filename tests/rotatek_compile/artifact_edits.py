"""Damage done to an artifact on purpose, and what its reader says: shared by the tests of both formats."""

import hashlib
import json

import pytest
from safetensors.torch import load_file, save_file

from rotatek_compile import ArtifactError
from rotatek_compile.artifact import CONFIG_FILE, TENSOR_FILE, read_artifact


def edit_config(folder, change):
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    result = change(config)
    file.write_text(json.dumps(config if result is None else result))


def edit_tensors(folder, change):
    """Change tensors and record their new checksum, as a faulty writer would."""
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSOR_FILE)
    digest = hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest()
    edit_config(folder, lambda config: config["files"][TENSOR_FILE].update(sha256=digest))


def refused(folder):
    with pytest.raises(ArtifactError) as error:
        read_artifact(folder)
    words = str(error.value)
    assert "\n" not in words and str(folder) in words
    return words


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def with_entry(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change
