"""Positions along three axes: our chunked, left-padded passes against single calls in which a tiny Qwen3-VL numbers tokens itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.bases import pca
from rotatek_compile.batches import Encoded, encode, merge_media, pad, positions, prompt_text, rope_index
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.cutter import Cutter
from rotatek_compile.errors import RotateKError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.geometry import Geometry, geometry_of
from rotatek_compile.models import checked_geometry

IMAGE, VIDEO, START, END, EOS = 5, 6, 7, 8, 2
PATCH, MERGE = 8, 2


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": EOS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration, config


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 128, "window_size": 32, "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config


@pytest.fixture(scope="module", params=[qwen3_vl, qwen2_5_vl])
def qwen(request):
    from transformers import GenerationConfig

    model_class, config = request.param()
    torch.manual_seed(3)
    model = model_class(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "visual" not in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=EOS)
    return model


@pytest.fixture(scope="module")
def items(qwen):
    """Three documents: images of 2 x 3, of 4 x 2 and 1 x 5, of 3 x 3 merged patches, between texts of different lengths."""
    rope = rope_index(qwen)
    made = []
    for n, (parts, question) in enumerate([([3, (2, 3)], 9), ([5, (4, 2), 2, (1, 5)], 4), ([1, (3, 3)], 6)]):
        generator = torch.Generator().manual_seed(n)
        words = lambda count, g=generator: torch.randint(10, 97, (count,), generator=g).tolist()  # noqa: E731
        ids, grids = [], []
        for part in parts:
            if isinstance(part, int):
                ids += words(part)
            else:
                grids.append([1, part[0] * MERGE, part[1] * MERGE])
                ids += [START, *[IMAGE] * (part[0] * part[1]), END]
        end = len(ids) - 1
        grid = torch.tensor(grids)
        pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)
        ids += words(question)
        media = {"pixel_values": pixels, "image_grid_thw": grid}
        sample = Sample(id=str(n), images=(), question="", answers=("",))
        made.append(Encoded(sample, ids, [*words(2 + n), EOS], end, media, rope(torch.tensor([ids]), media)))
    return made


def stock_logits(model, item, ids):
    """The library's own forward pass of one sample; it numbers the tokens from mm_token_type_ids."""
    ids = torch.tensor([ids])
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **item.media).logits[0]


def stock_logprobs(model, item):
    return stock_logits(model, item, item.prompt + item.answer[:-1])[-len(item.answer) :].double().log_softmax(-1)


@pytest.fixture
def evaluator(qwen):
    tokenizer = SimpleNamespace(pad_token_id=0)
    return lambda ask: Evaluator(qwen, SimpleNamespace(tokenizer=tokenizer), ask, (EOS,), 6)


def test_positions_by_hand(items):
    first = items[0]
    # 3 words and a start at 0..3, 2 x 3 patches from 4 on, an end after the larger side, 9 words, then the answer
    end = 4 + 3
    assert first.positions[0].tolist() == [0, 1, 2, 3, *[4] * 6, *range(end, end + 10)]
    assert first.positions[1].tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, *range(end, end + 10)]
    assert first.positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, *range(end, end + 10)]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    got = positions(items[:2], [8, len(items[1].prompt) - 1], mask)
    assert got[:, 0, 1:].tolist() == [[4, 4, 7], [5, 5, 7], [5, 6, 7]]
    last = int(items[1].positions.max())
    assert got[:, 1].tolist() == [[last, last + 1, last + 2, last + 3]] * 3
    plain = [Encoded(i.sample, i.prompt, i.answer, i.visual_end, {}) for i in items[:2]]
    assert positions(plain, [8, 2], mask)[:, 1:].tolist() == [[8, 9, 10], [3, 4, 5]]
    assert positions(plain, [8, 2], mask).shape == (2, 4)
    mixed = positions([items[0], plain[1]], [0, 2], mask)
    assert mixed[:, 1].tolist() == [[2, 3, 4, 5]] * 3


def test_positions_go_on_as_in_generate_where_the_prompt_ends_in_an_image(items):
    cut = items[0].positions[:, :9]  # in the second row of patches: axes stand at 4, 5, 5, the largest so far is 6
    item = Encoded(items[0].sample, items[0].prompt[:9], [1], 9, {}, cut)
    assert positions([item], [8], torch.ones(1, 3, dtype=torch.int64))[:, 0].tolist() == [[4, 7, 8], [5, 7, 8], [5, 7, 8]]


def test_chunked_and_left_padded_is_the_stock_forward(qwen, items, evaluator):
    """Prefill to the end of the images, then the rest, ragged rows; `rope_deltas` of another call must not matter."""
    for batch in (items[:2], items[1:], items):
        expected = [stock_logprobs(qwen, item) for item in batch]
        for ask in ("after", "with"):
            run = evaluator(ask)
            answered = run.answer(batch, run.dense_cache())
            for got, want in zip(answered.logprobs, expected, strict=True):
                assert (got - want).abs().max() < 1e-4
    assert expected[0].std() > 1  # peaked enough to tell


def test_greedy_answers_are_those_of_generate(qwen, items, evaluator):
    run = evaluator("after")
    got = run.answer(items, run.dense_cache()).generated
    for item, ids in zip(items, got, strict=True):
        qwen.model.rope_deltas = None
        prompt = torch.tensor([item.prompt])
        kinds = (prompt == IMAGE).long()
        stock = qwen.generate(input_ids=prompt, mm_token_type_ids=kinds, **item.media, max_new_tokens=6, do_sample=False)
        assert ids == stock[0, prompt.shape[1] :].tolist()


def test_ordinary_positions_would_be_seen(qwen, items, evaluator):
    plain = [Encoded(i.sample, i.prompt, i.answer, i.visual_end, i.media) for i in items[:2]]
    run = evaluator("after")
    got = run.answer(plain, run.dense_cache()).logprobs[0]
    assert (got - stock_logprobs(qwen, items[0])).abs().max() > 1e-2


def test_cutter_reads_the_stock_reference(qwen, items):
    geometry = geometry_of(qwen.config)
    bases = {i: pca(torch.eye(32).expand(2, 32, 32)) for i in geometry.compressible}
    cutter = Cutter(qwen, geometry, bases, span_all=False)
    for item in items:
        assert (cutter.prefill(item).reference[0] - stock_logprobs(qwen, item)).abs().max() < 1e-4


def test_calibration_does_not_depend_on_batches(qwen, items, tmp_path):
    """Moments of a ragged left-padded batch are those of single stock passes."""
    geometry = geometry_of(qwen.config)
    batched = calibrate(qwen, items, geometry, MomentStore({"n": 3}, tmp_path), 3, False, 0, True)
    seen = {}

    def spy(module, query, key, value, *args, **kwargs):
        if hasattr(module, "layer_idx"):
            seen.setdefault(module.layer_idx, []).append((query[0].double(), key[0].double()))
        return sdpa(module, query, key, value, *args, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        for item in items:
            stock_logits(qwen, item, item.prompt + item.answer)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    for layer in range(3):
        visual = [torch.tensor(item.prompt + item.answer) == IMAGE for item in items]
        keys = [k[:, v] for (_, k), v in zip(seen[layer], visual, strict=True)]
        assert torch.allclose(batched.sums[f"{layer}.visual.key_outer"], sum(k.mT @ k for k in keys), rtol=1e-4, atol=1e-3)
        readers = [q[:, item.visual_end :].unflatten(0, (2, 2)).flatten(1, 2) for (q, _), item in zip(seen[layer], items, strict=True)]
        assert torch.allclose(batched.sums[f"{layer}.query_outer"], sum(q.mT @ q for q in readers) / 32, rtol=1e-4, atol=1e-3)


def test_geometry_knows_the_axes(qwen, tiny, tiny_geometry):
    geometry = checked_geometry(qwen.config)
    assert geometry.position_axes == 3
    assert Geometry.from_json(geometry.to_json()) == geometry
    assert tiny_geometry.position_axes == 1
    old = tiny_geometry.to_json()
    del old["position_axes"]
    assert Geometry.from_json(old) == tiny_geometry
    assert rope_index(tiny) is None


def test_encode_asks_for_the_positions(qwen, items):
    item = items[1]

    class Processor:
        chat_template = "t"

        def __init__(self):
            self.tokenizer = lambda text, add_special_tokens: {"input_ids": [11]}

        def apply_chat_template(self, *args, **kwargs):
            return ""

        def __call__(self, text, images, return_tensors):
            ids = torch.tensor([item.prompt])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long(), **item.media}

    sample = Sample(id="s", images=("a", "b"), question="", answers=("x",))
    geometry = geometry_of(qwen.config)
    got = encode(Processor(), sample, geometry, EOS, rope_index(qwen))
    assert torch.equal(got.positions, item.positions)
    assert set(got.media) == {"pixel_values", "image_grid_thw"}
    with pytest.raises(RotateKError, match="along 3 axes"):
        encode(Processor(), sample, geometry, EOS)


def test_a_model_that_cannot_number_is_refused(qwen):
    with pytest.raises(RotateKError, match="has no get_rope_index"):
        rope_index(SimpleNamespace(config=qwen.config, model=SimpleNamespace()))
    other = SimpleNamespace(config=qwen.config, model=SimpleNamespace(get_rope_index=lambda input_ids, spatial_shapes: None))
    with pytest.raises(RotateKError, match="numbers its tokens in a way this version does not know"):
        rope_index(other)(torch.tensor([[1, IMAGE]]), {})


def test_axes_that_only_the_model_knows(qwen, items):
    """A config may leave the sections to the model's default."""
    bare = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(rope_parameters={}), image_token_id=IMAGE)
    rope = rope_index(SimpleNamespace(config=bare, model=qwen.model))
    assert torch.equal(rope(torch.tensor([items[1].prompt]), items[1].media), items[1].positions)


@pytest.fixture(scope="module")
def real():
    """A tiny Qwen3-VL with its processor, and three generated documents of different numbers of pages."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from tiny_training import qwen3_vl

    sys.path.pop(0)
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "feed_forward": 96, "vision_hidden": 32}
    model = qwen3_vl.build_model(qwen3_vl.build_config(**shape, vision_layers=3, vision_heads=2, vision_feed_forward=48), 1).eval()
    from PIL import Image

    processor = qwen3_vl.build_processor()
    pages = [Image.linear_gradient("L").rotate(90 * n).resize((64 + 32 * n, 96)).convert("RGB") for n in range(4)]
    samples = [
        Sample(id="a", images=(pages[0],), question="What is the total of the second column?", answers=("12",)),
        Sample(id="b", images=(pages[1], pages[2]), question="Which page?", answers=("the last",)),
        Sample(id="c", images=(pages[3],), question="How many?", answers=("7",)),
    ]
    return model, processor, samples


def test_encoded_samples_give_the_logits_of_the_processors_own_output(real):
    model, processor, samples = real
    geometry, rope = checked_geometry(model.config), rope_index(model)
    items = [encode(processor, sample, geometry, EOS, rope) for sample in samples]
    run = Evaluator(model, processor, "after", (EOS,), 2)
    for batch, originals in ((items[:2], samples[:2]), (items, samples)):
        answered = run.answer(batch, run.dense_cache())
        for item, sample, got in zip(batch, originals, answered.logprobs, strict=True):
            text = prompt_text(processor, len(sample.images), sample.question)
            inputs = processor(text=[text], images=list(sample.images), return_tensors="pt")
            answer = torch.tensor([item.answer[:-1]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
            model.model.rope_deltas = None
            with torch.no_grad():
                want = model(**inputs).logits[0, -len(item.answer) :].double().log_softmax(-1)
            assert (got - want).abs().max() < 1e-4


def test_patches_of_a_batch_are_stacked_in_order(items):
    merged = merge_media(items, torch.device("cpu"), torch.bfloat16)
    assert merged["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4], [1, 2, 10], [1, 6, 6]]
    assert merged["image_grid_thw"].dtype == torch.int64
    assert merged["pixel_values"].shape == (24 + 32 + 20 + 36, 3 * 2 * PATCH * PATCH)
    assert merged["pixel_values"].dtype == torch.bfloat16
    assert pad([item.prompt for item in items], 0).ids.shape[0] == 3
