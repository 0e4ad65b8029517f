"""Encoded documents for the tiny random LLaVA-NeXT of the runtime tests: ids and pixels made directly, no processor."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.batches import Encoded
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.geometry import Geometry, geometry_of

_spec = importlib.util.spec_from_file_location("rotatek_runtime_conftest", Path(__file__).parent.parent / "runtime" / "conftest.py")
_runtime = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _runtime  # its data classes look themselves up
_spec.loader.exec_module(_runtime)
EOS = 2


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    return _runtime.build_model()


@pytest.fixture(scope="session")
def tiny_geometry(tiny: Any) -> Geometry:
    return geometry_of(tiny.config)


@pytest.fixture
def rival(tiny_geometry: Geometry) -> Artifact:
    """An artifact of a rival method, as far as reports read it."""
    tensors = {f"layers.{i}.knockout": torch.tensor([0.5, 0.0]) for i in range(3)}
    return Artifact(tiny_geometry, Method(rival="head-drop", keep_ratio=1.0, kv_budget=0.125), tensors, {"id": "org/model"}, {})


@pytest.fixture(scope="session")
def make_artifact(tiny_geometry: Geometry) -> Callable[..., Any]:
    return _runtime.make_artifact.__wrapped__(tiny_geometry)


@pytest.fixture(scope="session")
def documents(tiny: Any) -> list[Encoded]:
    """Five documents of 1 or 2 images of different sizes, questions of 3 to 11 tokens, answers of 2 to 6 (the last is the end)."""
    prompts = _runtime.Prompts(tiny)
    square, wide, tall = prompts.square, prompts.wide, prompts.tall
    shapes = [[3, square, 7], [9, tall, 2, wide, 3], [1, wide, 11], [5, square, 4], [2, tall, 6]]
    made = []
    for n, parts in enumerate(shapes):
        inputs = prompts.batch([parts], [n], [10 * n + k for k in range(sum(not isinstance(p, int) for p in parts))])
        ids = inputs["input_ids"][0].tolist()
        end = len(ids) - ids[::-1].index(_runtime.IMAGE)
        answer = [*prompts.row([n + 1], 40 + n)[0], EOS]
        media = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        sample = Sample(id=str(n), images=(), question="", answers=(" ".join(map(str, answer[:-1])),))
        made.append(Encoded(sample, ids, answer, end, media))
    return made


@pytest.fixture(scope="session")
def fake_processor() -> Any:
    """Text of ids is the ids, written out."""
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    return SimpleNamespace(tokenizer=tokenizer)


@pytest.fixture(scope="session")
def attention_inputs(tiny: Any) -> Callable[[Encoded], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """q [Hq, T, D], k and v [Hkv, T, D] of every layer for one document with its answer, taken by replacing sdpa once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def record(item: Encoded) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        seen, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

        def spy(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(module, "layer_idx"):
                seen.append((query[0].clone(), key[0].clone(), value[0].clone()))
            return sdpa(module, query, key, value, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
        try:
            with torch.no_grad():
                tiny(input_ids=torch.tensor([item.prompt + item.answer]), use_cache=False, **item.media)
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        return seen

    return record


sys.path.insert(0, str(Path(__file__).parent))  # for artifact_edits, which two files share
