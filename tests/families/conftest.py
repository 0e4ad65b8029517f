"""Families as fixtures: `family(name)` builds a tiny random checkpoint, compiles it through the real path and loads it, once a session."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
import builders  # noqa: E402

WINDOW = 32
SIZES = [(96, 80), (80, 128), (64, 64)]  # wide, tall and square pages


def page(number: int) -> Image.Image:
    """A page of the bundled set `mixed`, small."""
    from rotatek_compile.calibration_data.registry import open_data

    return open_data("forms", "evaluation", number).sample(0).images[0].resize(SIZES[number % 3])


@dataclass
class Output:
    """Token ids [B, N] that were generated, logits fp32 [B, N, V] before each, and the cache."""

    tokens: Tensor
    logits: Tensor
    cache: Any


@dataclass
class Compiled:
    """A family: its checkpoint, stock model, processor and an artifact of keep ratio 0.5."""

    name: str
    folder: Path
    artifact: Path
    model: Any
    processor: Any

    @property
    def text_only(self) -> bool:
        return self.name in builders.TEXT_ONLY

    def inputs(self, *questions: str, images: Sequence[int] = ()) -> Any:
        """Left-padded inputs of `generate`: a question per row, after as many pages as `images` says for the row (1 by default)."""
        from rotatek_compile.batches import prompt_text

        counts = [0] * len(questions) if self.text_only else images or [1] * len(questions)
        texts = [prompt_text(self.processor, count, question) for count, question in zip(counts, questions, strict=True)]
        pages = [[page(row + n) for n in range(count)] for row, count in enumerate(counts)]
        extra = {"images": pages} if any(counts) else {}
        return self.processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt", **extra)

    def generate(self, inputs: Any, new: int = 6, **options: Any) -> Output:
        """`generate` with whatever cache the model is set to use, never ending early."""
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None  # state of the stock model that an unrelated call would leave behind
        visual = [token for token in builders.ID.values() if token not in (builders.UNKNOWN,)]  # no placeholder is generated
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": builders.PAD, "suppress_tokens": visual, **options}
        out = self.model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options)
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        return Output(tokens, torch.stack(out.logits, 1).float(), out.past_key_values)


def write_data(folder: Path) -> dict[bool, Path]:
    """Four questions about pages, and four longer ones without: files by whether they are text only."""
    for number in range(3):
        page(number).save(folder / f"page{number}.png")
    about = [{"question": f"What is field {n} here?", "answers": [f"word {n}"], "images": [f"page{n % 3}.png"]} for n in range(4)]
    about[1]["images"].append("page2.png")
    plain = [{"question": f"What comes after {n}, {n + 1}, and so on? " * (2 + n), "answer": f"word {n}"} for n in range(4)]
    files = {}
    for text_only, rows in ((False, about), (True, plain)):
        files[text_only] = folder / f"{'text' if text_only else 'pages'}.jsonl"
        files[text_only].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture(scope="session")
def family_data(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return write_data(tmp_path_factory.mktemp("family-data"))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, family_data: dict[bool, Path]) -> Callable[[str], Compiled]:
    from rotatek_compile import CompileOptions, compile_artifact, models

    made: dict[str, Compiled] = {}

    def get(name: str) -> Compiled:
        if lack := builders.missing(name):
            pytest.skip(f"the processor of {name} needs {lack}")
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            checkpoint, artifact = builders.build(name, folder / "checkpoint"), folder / "artifact"
            text_only = name in builders.TEXT_ONLY
            options = CompileOptions(
                model=str(checkpoint), calib=str(family_data[text_only]), output=artifact, span="all" if text_only else "visual",
                window=WINDOW, num_samples=4, batch_size=2, keep_ratio=0.5, allocation="uniform", device="cpu", quiet=True,
            )  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rotatek_compile.compiler.draw_heads", lambda *_: False)  # the card's picture takes longer than the rest
                compile_artifact(options)
            source = models.resolve(str(checkpoint))
            model = models.load_model(source, torch.float32, torch.device("cpu"))
            made[name] = Compiled(name, checkpoint, artifact, model, models.load_processor(source, artifact))
        return made[name]

    return get
