"""A tiny random LLaVA-NeXT (3 layers, 4 query and 2 KV heads of 32), prompts with images of several sizes, artifacts in memory.

Weights have unit gain, so that attention is peaked and every image and every Key direction changes the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.bases import calibrated_basis
from rotatek_compile.geometry import Geometry, geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan, plan_tensors
from rotatek_compile.runtime.coder import CodedSegment

HEADS, DIM, LAYERS, VOCABULARY, IMAGE = 2, 32, 3, 97, 5
SQUARE, WIDE, TALL = (128, 128), (64, 128), (128, 64)  # height, width of images


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(1)


def build_model(seed: int = 0, **text: Any) -> Any:
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    shape = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": DIM}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            image_size=64, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        text_config=LlamaConfig(
            **{**shape, **text}, vocab_size=VOCABULARY, intermediate_size=96, max_position_embeddings=4096, pad_token_id=0, eos_token_id=2
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[128, 128]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "vision" not in name:
            peaked = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else peaked * weight.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def model() -> Any:
    return build_model()


@pytest.fixture(scope="session")
def geometry(model: Any) -> Geometry:
    return geometry_of(model.config)


@dataclass
class Prompts:
    """Builds batches: a row is a list of text lengths and image sizes, such as `[3, SQUARE, 20]`."""

    model: Any
    square: tuple[int, int] = SQUARE
    wide: tuple[int, int] = WIDE
    tall: tuple[int, int] = TALL

    def image_tokens(self, size: tuple[int, int]) -> int:
        tokens = {self.square: 88, self.wide: 16 + 4 * 9, self.tall: 16 + 8 * 5}
        return tokens[size]

    def row(self, parts: Sequence[Any], seed: int) -> tuple[list[int], list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(6, VOCABULARY, (part,), generator=generator).tolist()
            else:
                ids += [IMAGE] * self.image_tokens(part)
        return ids, [part for part in parts if not isinstance(part, int)]

    def batch(
        self, rows: Sequence[Sequence[Any]], seeds: Sequence[int] | None = None, pixels: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Left-padded inputs of `generate`. `seeds` name the rows' texts, `pixels` the images' contents, in order."""
        seeds = seeds if seeds is not None else range(len(rows))
        built = [self.row(parts, seed) for parts, seed in zip(rows, seeds, strict=True)]
        longest = max(len(ids) for ids, _ in built)
        inputs = {
            "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in built]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in built]),
        }
        sizes = [size for _, images in built for size in images]
        if sizes:
            contents = pixels if pixels is not None else range(len(sizes))
            images = [torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(100 + n)) for n in contents]
            inputs |= {"pixel_values": torch.stack(images), "image_sizes": torch.tensor(sizes)}
        return inputs


@pytest.fixture(scope="session")
def prompts(model: Any) -> Prompts:
    return Prompts(model)


@pytest.fixture(scope="session")
def ragged(prompts: Prompts) -> dict[str, Tensor]:
    """Four rows with 1, 3, 0 and 2 images, all of different length."""
    p = prompts
    return p.batch([[3, p.square, 40], [50, p.square, 1, p.tall, 2, p.wide, 7], [25], [4, p.wide, p.tall, 9]])


@pytest.fixture(scope="session")
def make_artifact(geometry: Geometry) -> Callable[..., Artifact]:
    """An artifact with random bases. `ranks` are native Key directions: one number for all heads, or a list per layer; `plan` sets both
    sides of every head, as a list per layer."""

    def make(
        ranks: Any = DIM,
        shape: Geometry | None = None,
        fallback: float = 0.0,
        basis: str = "two-sided",
        plan: Any = None,
        **options: Any,
    ) -> Artifact:
        shape = shape or geometry
        method = Method(basis=basis, fallback_factor=fallback, **{"window": 32, **options})
        generator = torch.Generator().manual_seed(7)
        tensors, heads_of = {}, {}
        for i in shape.compressible:
            heads, dim = shape.layers[i].kv_heads, shape.layers[i].head_dim
            for kind in method.kinds:
                a, b = torch.randn(2, heads, dim, dim, generator=generator)
                made = calibrated_basis(basis, a @ a.mT / dim, b @ b.mT / dim)
                for side in ("key", "value"):
                    tensors[f"layers.{i}.{kind}.{side}_mean"] = torch.randn(heads, dim, generator=generator)
                    tensors[f"layers.{i}.{kind}.{side}_encode"] = made.encode.float()
                    tensors[f"layers.{i}.{kind}.{side}_spectrum"] = made.spectrum.float()
            own = [ranks] * heads if isinstance(ranks, int) else ranks[i]
            heads_of[i] = plan[i] if plan else [HeadPlan(Slabs(rank), Slabs(dim)) for rank in own]
            for side in ("key", "value"):
                tensors[f"layers.{i}.{side}_sensitivity"] = torch.zeros(heads, 0)
        return Artifact(shape, method, tensors | plan_tensors(heads_of), {}, {})

    return make


class ExactCoder:
    """A rival that keeps everything: with it the cache is the stock cache."""

    name, setting = "exact", ""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        return CodedSegment(keys.shape[1], {"keys": keys, "values": values}, frozenset({"keys", "values"}), self.rebuilt)

    def rebuilt(self, parts: Any, tokens: int) -> tuple[Tensor, Tensor]:
        return parts["keys"], parts["values"]

    def bytes_of(self, tokens: int, layer: int) -> int:
        return HEADS * tokens * 2 * DIM * 2


@pytest.fixture(scope="session")
def exact_coder() -> ExactCoder:
    return ExactCoder()


@dataclass
class Output:
    """Token ids [B, N] that were generated and logits fp32 [B, N, V] before each, and the cache."""

    tokens: Tensor
    logits: Tensor
    cache: Any


@pytest.fixture(scope="session")
def generate() -> Callable[..., Output]:
    """`model.generate`, never ending early."""

    def run(model: Any, inputs: dict[str, Tensor], new: int = 24, **options: Any) -> Output:
        options = {"do_sample": False, "eos_token_id": -1, "suppress_tokens": [IMAGE], **options}
        out = model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options)
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        return Output(tokens, torch.stack(out.logits, 1).float(), out.past_key_values)

    return run


@pytest.fixture(scope="session")
def check_equal() -> Callable[..., None]:
    """Same tokens, logits within 1e-4 in a model whose logits differ by more than 1 from token to token."""

    def check(got: Output, expected: Output, tolerance: float = 1e-4) -> None:
        assert torch.equal(got.tokens, expected.tokens)
        assert expected.logits.std() > 0.5
        assert (got.logits - expected.logits).abs().max() <= tolerance

    return check


sys.path.insert(0, str(Path(__file__).parent))  # for palu_cases, which files of two folders share
