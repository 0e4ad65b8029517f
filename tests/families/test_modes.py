"""Families x modes: at keep ratio 1 every cell is the stock model, tokens and logits; below, the two torch backends agree.

`benchmarks/print_matrix.py` runs this file and prints the table of docs/generation.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

sys.path.append(str(Path(__file__).parent))

from builders import BUILDERS, TEXT_ONLY, VISION, missing  # noqa: E402
from modes import MODES, Output, Subject, Unfit  # noqa: E402

from rotatek_compile.artifact import Artifact, Method  # noqa: E402
from rotatek_compile.bases import calibrated_basis  # noqa: E402
from rotatek_compile.geometry import Geometry, geometry_of  # noqa: E402
from rotatek_compile.kernels.slabs import Slabs  # noqa: E402
from rotatek_compile.plan import SIDES, HeadPlan, plan_tensors  # noqa: E402
from rotatek_compile.runtime.cache import RotateKCache, RotateKLayer  # noqa: E402
from rotatek_compile.runtime.enable import enable  # noqa: E402

DIM = 32
FULL = [HeadPlan(Slabs(DIM), Slabs(DIM))] * 2
HALF = [  # about half of the directions, at all precisions, of Keys and of Values
    HeadPlan(Slabs(16), Slabs(DIM)),
    HeadPlan(Slabs(0, 8), Slabs(8, 8)),
    HeadPlan(Slabs(DIM), Slabs(0, 0, 16)),
    HeadPlan(Slabs(8, 0, 16), Slabs(0, 8, 16)),
]
OLDER = Version(transformers.__version__) < Version("5.23")  # whose stock models cannot prefill pictures in chunks, for one
_subjects: dict[str, Subject] = {}


def subject(name: str) -> Subject:
    if name not in _subjects:
        _subjects.clear()  # one family at a time is alive
        model, processor = BUILDERS[name]()
        _subjects[name] = Subject(name, model.float().eval(), processor, name in VISION)
    return _subjects[name]


def artifact(shape: Geometry, heads_of: list[HeadPlan], span: str) -> Artifact:
    """Random bases; text models have nothing but text to code."""
    method = Method(span=span, window=8, fallback_factor=0.0)
    generator, tensors, plan = torch.Generator().manual_seed(7), {}, {}
    for number, i in enumerate(shape.compressible):
        heads, dim = shape.layers[i].kv_heads, shape.layers[i].head_dim
        for kind in method.kinds:
            a, b = torch.randn(2, heads, dim, dim, generator=generator)
            made = calibrated_basis("two-sided", a @ a.mT / dim, b @ b.mT / dim)
            for side in SIDES:
                tensors[f"layers.{i}.{kind}.{side}_mean"] = torch.randn(heads, dim, generator=generator)
                tensors[f"layers.{i}.{kind}.{side}_encode"] = made.encode.float()
                tensors[f"layers.{i}.{kind}.{side}_spectrum"] = made.spectrum.float()
        assert dim == DIM
        plan[i] = [heads_of[(number * heads + h) % len(heads_of)] for h in range(heads)]
    return Artifact(shape, method, tensors | plan_tensors(plan), {}, {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*VISION, *TEXT_ONLY])
@pytest.mark.filterwarnings("ignore")
def test_cell(family: str, mode: str) -> None:
    """Named `family-mode`; a skip says why there is no such cell."""
    if package := missing(family):
        pytest.skip(f"its processor needs {package}")
    s, run = subject(family), MODES[mode]
    span = "visual" if s.sees else "all"
    shape = geometry_of(s.model.config)
    torch.set_num_threads(1)
    with torch.no_grad():
        try:
            stock = run(s)
        except Unfit as reason:
            pytest.skip(str(reason))
        except Exception as error:  # the same call without us
            if not OLDER:
                raise
            pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}".splitlines()[0])
        outputs: list[Output] = []
        for plan, backend in ((FULL, "torch"), (HALF, "torch"), (HALF, "reconstruct")):
            with enable(s.model, artifact(shape, plan, span), backend=backend):
                outputs.append(run(s))
    full, compressed, rebuilt = outputs
    equal(full, stock)
    equal(compressed, rebuilt, 2e-3)  # the last bit of a Key may turn over a code of few bits
    if compressed.cache is not None:
        assert isinstance(compressed.cache, RotateKCache)
        layers = [layer for layer in compressed.cache.layers if isinstance(layer, RotateKLayer)]
        assert all(layer.store.coded_tokens() for layer in layers) or not s.sees
        if mode == "video":
            assert [len(set(layer.store.table[0, 0, :, 2])) for layer in layers] == [1] * len(layers)  # one segment per clip


def equal(one: Output, other: Output, tolerance: float = 1e-4) -> None:
    """Same tokens, logits within the tolerance where those of different tokens differ by far more."""
    if one.logits is None:
        assert one.tokens == other.tokens
        return
    assert torch.equal(one.tokens, other.tokens)
    assert other.logits.std() > 0.1
    # dropped tokens are -inf in both
    finite = torch.isfinite(other.logits)
    assert torch.equal(finite, torch.isfinite(one.logits))
    assert (one.logits - other.logits)[finite].abs().max() <= tolerance
