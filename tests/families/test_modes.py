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
from family_artifacts import FULL, HALF, artifact  # noqa: E402
from modes import MODES, Output, Subject, Unfit  # noqa: E402

from rotatek_compile.geometry import geometry_of  # noqa: E402
from rotatek_compile.runtime.cache import RotateKCache, RotateKLayer  # noqa: E402
from rotatek_compile.runtime.enable import enable  # noqa: E402

OLDER = Version(transformers.__version__) < Version("5.23")  # whose stock models cannot prefill pictures in chunks, for one
_subjects: dict[str, Subject] = {}


def subject(name: str) -> Subject:
    if name not in _subjects:
        _subjects.clear()  # one family at a time is alive
        model, processor = BUILDERS[name]()
        _subjects[name] = Subject(name, model.float().eval(), processor, name in VISION)
    return _subjects[name]


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
