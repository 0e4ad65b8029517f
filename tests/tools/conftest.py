"""What tests of the trainer share: `tiny_training` on the path, and small batches of packed documents."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.fixture(scope="session")
def pack():
    """`pack(vocabulary, documents, pages, length=...)`: a batch of real packed documents."""
    from tiny_training.bundled import draws
    from tiny_training.documents import Batch, pack_document

    def make(vocabulary, documents, pages, length=120, fullness=100, name="test"):
        rows = [pack_document(draws.Draws(f"{name}/{n}"), pages, fullness, length, vocabulary) for n in range(documents)]
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))

    return make


@pytest.fixture(scope="session")
def to_images():
    """Drawn pages uint8 [B, P, H, W] to pictures, a list of lists."""

    def convert(pages):
        return [[Image.fromarray(page.numpy()).convert("RGB") for page in document] for document in pages]

    return convert
