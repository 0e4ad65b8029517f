"""Every way of generating: equal to the stock model with all directions kept, and the two torch backends equal to each other below.

Each mode is run on the stock cache, on a full-rank artifact, and on ones with mixed ranks and mixed precisions on two backends.
"""

import pytest
import torch

from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.cache import RotateKLayer
from rotatek_compile.runtime.enable import enable

MIXED = [[8, 24], [0, 16], [0, 0]]  # odd multiples of 8, a dropped head, a dropped layer
RAW = Slabs(32)
SLABS = [  # every precision and both sides; raw heads beside coded ones, a layer without Keys
    [HeadPlan(Slabs(8, 8, 16), Slabs(0, 16)), HeadPlan(RAW, Slabs(8, 0, 16))],
    [HeadPlan(Slabs(0, 24), RAW), HeadPlan(Slabs(0, 0, 32), Slabs(0, 0, 16))],
    [HeadPlan(Slabs(), Slabs(0, 8)), HeadPlan(Slabs(), Slabs(24))],
]
PLANS = {"raw": {}, "ranks": {"ranks": MIXED}, "slabs": {"plan": SLABS}}
TOLERANCE = {"raw": 1e-4, "ranks": 1e-4, "slabs": 2e-3}  # the last bit of a Key may turn over a code of few bits


def greedy(model, prompts, generate):
    return generate(model, prompts.batch([[3, prompts.square, 40], [50, prompts.square, 1, prompts.tall, 7], [25]]), 12)


def beams(model, prompts, generate):
    return generate(model, prompts.batch([[3, prompts.square, 10], [5, prompts.tall, 20]]), 16, num_beams=3, num_return_sequences=2)


def sampling(model, prompts, generate):
    torch.manual_seed(5)
    rows = prompts.batch([[3, prompts.square, 10], [30]])
    return generate(model, rows, 16, do_sample=True, num_return_sequences=3, temperature=0.7)


def prompt_lookup(model, prompts, generate):
    inputs = prompts.batch([[3, prompts.square, 40]])
    inputs["input_ids"][0, -12:] = torch.tensor([20, 21, 22] * 4)
    return generate(model, inputs, 60, prompt_lookup_num_tokens=5, max_matching_ngram_size=1)


def two_turns(model, prompts, generate, question=9):
    """A second question on the same cache, for a batch without padding in the second turn."""
    return ask_again(model, prompts, generate, prompts.row([question], 50)[0], {})


def long_question(model, prompts, generate):
    """More tokens than one decode call takes (64 / G = 32), and more than window and block together."""
    return two_turns(model, prompts, generate, question=150)


def second_image(model, prompts, generate):
    ids, _ = prompts.row([4, prompts.tall, 40], 50)
    media = prompts.batch([[prompts.tall]] * 2, pixels=[60, 61])
    return ask_again(model, prompts, generate, ids, {name: media[name] for name in ("pixel_values", "image_sizes")})


def ask_again(model, prompts, generate, ids, media):
    inputs = prompts.batch([[3, prompts.square, 40], [50, prompts.square, 7]])
    first = generate(model, inputs, 6)
    more = torch.tensor([ids, ids[::-1]]) if not media else torch.tensor([ids, ids])
    whole = torch.cat([inputs["input_ids"], first.tokens, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(whole[:, inputs["input_ids"].shape[1] :])], 1)
    return generate(model, {"input_ids": whole, "attention_mask": mask, **media}, 10, past_key_values=first.cache)


MODES = (greedy, beams, sampling, prompt_lookup, two_turns, long_question, second_image)


@pytest.fixture(scope="module")
def stock(model, prompts, generate):
    done = {}

    def get(mode):
        if mode not in done:
            done[mode] = mode(model, prompts, generate)
        return done[mode]

    return get


@pytest.mark.parametrize(("backend", "span"), [("torch", "visual"), ("torch", "all"), ("reconstruct", "all")])
@pytest.mark.parametrize("mode", MODES)
def test_full_rank_is_the_stock_model(model, prompts, generate, stock, check_equal, make_artifact, mode, backend, span):
    with enable(model, make_artifact(span=span), backend=backend):
        got = mode(model, prompts, generate)
    check_equal(got, stock(mode))


@pytest.mark.parametrize(
    ("plan", "span", "fallback", "budget"),
    [("ranks", "visual", 0.0, None), ("slabs", "visual", 0.0, 0.5), ("slabs", "all", 0.0, None), ("slabs", "all", 1.0, 0.5)],
)
@pytest.mark.parametrize("mode", MODES)
def test_backends_agree_below_full_rank(model, prompts, generate, stock, check_equal, make_artifact, mode, plan, span, fallback, budget):
    artifact = make_artifact(**PLANS[plan], span=span, fallback=fallback, kv_budget=budget)
    outputs = []
    for backend in ("torch", "reconstruct"):
        with enable(model, artifact, backend=backend):
            outputs.append(mode(model, prompts, generate))
    check_equal(*outputs, TOLERANCE[plan])
    dense = stock(mode)
    steps = min(outputs[0].logits.shape[1], dense.logits.shape[1])
    if fallback == 0.0:  # something was lost, so these runs do compress
        assert (outputs[0].logits[:, :steps] - dense.logits[:, :steps]).abs().max() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_a_rival_that_keeps_everything_is_the_stock_model(model, prompts, generate, stock, check_equal, make_artifact, exact_coder, mode):
    with enable(model, make_artifact(), backend="torch") as enabled:
        enabled.prepared.coder = exact_coder
        got = mode(model, prompts, generate)
    check_equal(got, stock(mode))
    assert any(layer.spans.tokens() for layer in got.cache.layers)


def test_prompt_lookup_crops(model, prompts, generate, stock, make_artifact, monkeypatch):
    crops, crop = [], RotateKLayer.crop
    monkeypatch.setattr(RotateKLayer, "crop", lambda layer, n: (crops.append(n), crop(layer, n)))
    with enable(model, make_artifact(), backend="torch"):
        got = prompt_lookup(model, prompts, generate)
    assert min(crops) < 0
    # one forward call of at most 6 tokens per crop: what was not cropped is the output
    assert got.cache.get_seq_length() == 3 + 88 + 40 + 60 - 1


def test_placeholders_without_an_image_are_text(model, prompts, make_artifact):
    """Prompt lookup proposes what followed an n-gram, so also image placeholders: they are read as text and cropped again."""
    inputs, step = prompts.batch([[3, prompts.square, 40]]), torch.tensor([[17]])
    proposal = torch.tensor([[17, 5, 5, 5]])
    with torch.no_grad():
        stock = model(**dict(inputs, input_ids=torch.cat([inputs["input_ids"], step, step], 1), attention_mask=None)).logits[:, -2:]
        with enable(model, make_artifact(), backend="torch") as enabled:
            cache = enabled.new_cache()
            model(**inputs, past_key_values=cache)
            first = model(input_ids=proposal, past_key_values=cache).logits[:, :1]
            cache.crop(-3)
            second = model(input_ids=step, past_key_values=cache).logits
    assert (torch.cat([first, second], 1) - stock).abs().max() < 1e-4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("basis", ["two-sided", "pca", "paper"])
def test_backends_agree_for_every_basis(model, ragged, generate, check_equal, make_artifact, basis, plan):
    outputs = []
    for backend in ("torch", "reconstruct"):
        with enable(model, make_artifact(**PLANS[plan], basis=basis, span="all"), backend=backend):
            outputs.append(generate(model, ragged, 12))
    check_equal(*outputs, TOLERANCE[plan])


def test_precision_is_worth_its_bytes(model, ragged, generate, make_artifact):
    """More bits of all directions lose less, of Keys and of Values; 8 bits lose next to nothing."""
    with torch.no_grad():
        first = generate(model, ragged, 1)
        mask = torch.cat([ragged["attention_mask"], torch.ones(4, 1, dtype=torch.int64)], 1)
        step = {"input_ids": torch.full((4, 1), 17), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        dense = model(**step, past_key_values=first.cache).logits
        for side in ("key", "value"):
            errors = []
            for slabs in (Slabs(), Slabs(0, 0, 32), Slabs(0, 32), RAW):
                head = HeadPlan(RAW, RAW)._replace(**{side: slabs})
                with enable(model, make_artifact(plan=[[head] * 2] * 3, span="all", prior_tokens=0), backend="torch"):
                    got = model(**step, past_key_values=generate(model, ragged, 1).cache).logits
                errors.append(float((got - dense).square().mean()))
            assert errors[3] < 1e-9
            assert errors[2] < 1e-3 * errors[0]
            assert 10 * errors[2] < errors[1] < 0.2 * errors[0]


def test_more_directions_lose_less(model, ragged, generate, make_artifact):
    stock = generate(model, ragged, 1)
    question = torch.full((4, 1), 17)
    errors = []
    for rank in (0, 8, 16, 24, 32):
        with enable(model, make_artifact(rank, basis="pca", span="all"), backend="torch"), torch.no_grad():
            cache = generate(model, ragged, 1).cache
            mask = torch.cat([ragged["attention_mask"], torch.ones(4, 1, dtype=torch.int64)], 1)
            got = model(input_ids=question, attention_mask=mask, past_key_values=cache).logits
        with torch.no_grad():
            dense_cache = generate(model, ragged, 1).cache
            dense = model(input_ids=question, attention_mask=mask, past_key_values=dense_cache).logits
        errors.append(float((got - dense).pow(2).mean()))
    assert errors[-1] < 1e-8
    assert all(a > 1.05 * b for a, b in zip(errors[:-1], errors[1:], strict=True)), errors
    assert stock.logits.std() > 0.5


@pytest.mark.parametrize("question", [5, 40, 150])
@pytest.mark.parametrize(("plan", "backend"), [("raw", "torch"), ("raw", "reconstruct"), ("ranks", "torch"), ("slabs", "torch")])
def test_padding_in_the_middle(model, prompts, make_artifact, question, plan, backend):
    """Prefix and question are left-padded chunks of their own: a row equals the same row alone, without any padding."""
    p = prompts
    prefix = [[3, p.square], [50, p.square, 1, p.tall], [4]]
    rest = [prompts.row([n], 70 + n)[0] for n in (question, 3, question - 2)]
    batch = p.batch(prefix)
    width = max(map(len, rest))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rest])
    mask = torch.cat([batch["attention_mask"], torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rest])], 1)
    last = torch.full((3, 1), 17)
    longer = torch.cat([mask, torch.ones_like(last)], 1)

    def read(inputs, ids, mask, longer, cache):
        cut, end = mask.shape[1] - ids.shape[1], mask.shape[1]
        positions = (longer.cumsum(-1) - 1).clamp_min(0)
        model(**inputs, position_ids=positions[:, :cut], past_key_values=cache)
        one = model(input_ids=ids, attention_mask=mask, position_ids=positions[:, cut:end], past_key_values=cache)
        two = model(input_ids=last[: len(ids)], attention_mask=longer, position_ids=positions[:, end:], past_key_values=cache)
        return torch.cat([one.logits, two.logits], 1)

    first_pixel = (0, 1, 3)
    with torch.no_grad(), enable(model, make_artifact(**PLANS[plan], span="all"), backend=backend) as enabled:
        together = read(batch, ids, mask, longer, enabled.new_cache())
        for row in range(3):
            images = len([x for x in prefix[row] if not isinstance(x, int)])
            alone = p.batch([prefix[row]], [row], range(first_pixel[row], first_pixel[row] + images))
            own = torch.tensor([rest[row]])
            ones = torch.ones(1, alone["input_ids"].shape[1] + own.shape[1], dtype=torch.int64)
            single = read(alone, own, ones, torch.cat([ones, ones[:, :1]], 1), enabled.new_cache())
            assert (together[row, -single.shape[1] :] - single[0]).abs().max() < TOLERANCE[plan]
            if plan == "raw":
                whole = dict(alone, input_ids=torch.cat([alone["input_ids"], own, last[:1]], 1), attention_mask=None)
                assert (single[0] - model(**whole).logits[0, -single.shape[1] :]).abs().max() < 1e-4


def test_a_second_image_is_coded_too(model, prompts, generate, make_artifact):
    """Also from transformers 5.23 on, which gives the model encoder outputs in place of pixels."""
    with enable(model, make_artifact(MIXED), backend="torch"):
        cache = second_image(model, prompts, generate).cache
    assert [layer.store.coded_tokens() for layer in cache.layers] == [2 * (88 + 56)] * 3
