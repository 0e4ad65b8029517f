"""Text that leaves the window: calibrated coordinates until they discard too much, then the row's own; beams; cropping."""

import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.kernels.decode_torch import reconstruct
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import BASIS, KEY, LENGTH, NONE, OWN_MEAN, SCALES
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.observed import Rules
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.rounding_error import bound
from rotatek_compile.runtime.store import Store
from rotatek_compile.runtime.text_blocks import TextBlocks

DIM, HEADS, LAYERS, BLOCK = 32, 2, 3, 64
RAW = Slabs(DIM)
PLAN = [HeadPlan(Slabs(8, 0, 16), Slabs(0, 16)), HeadPlan(Slabs(0, 16), RAW)]
FACTOR = 8.0


@pytest.fixture
def case(make_artifact):
    """(store, text blocks) of one layer for so many rows."""

    def make(batch=1, factor=FACTOR, prior=256):
        artifact = make_artifact(plan=dict.fromkeys(range(LAYERS), PLAN), span="all")
        prepared = PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32)
        store = Store(batch, HEADS, DIM, torch.float32, torch.device("cpu"), prepared)
        return store, TextBlocks(store, prepared.kinds["text"], Rules(prior, factor))

    return make


def text(blocks, seed, kind="usual"):
    """Keys and Values [H, 64, D] of one block: like the calibration, or of another kind (turned, shifted and three times as large)."""
    sides = []
    for n, side in enumerate(blocks.basis.sides):
        z = torch.randn(HEADS, BLOCK, DIM, generator=torch.Generator().manual_seed(2 * seed + n))
        z = z * side.spectrum.sqrt().float().unsqueeze(1)
        if kind == "other":
            z = z.flip(-1) * 3
        x = side.mean.unsqueeze(1) + (z * side.balance.unsqueeze(1)) @ side.decode.mT
        sides.append(x + 2 if kind == "other" else x)
    return tuple(sides)


def write(blocks, row, kinds, start=0):
    """Blocks of these kinds after one another: what was written."""
    written = [text(blocks, start + n + 100 * row, kind) for n, kind in enumerate(kinds)]
    for keys, values in written:
        blocks.write([row], keys.unsqueeze(0), values.unsqueeze(0))
        blocks.store.flush()
    return written


def errors(blocks, row, written):
    """Energy discarded per token of every block, side and head, in whitened coordinates: fp64 [blocks, 2, H], from the stored codes."""
    found = torch.zeros(len(written), 2, HEADS, dtype=torch.float64)
    for h in range(HEADS):
        rebuilt = reconstruct(blocks.store.view(splits=False))[row][h]
        for n, exact in enumerate(written):
            for side, (basis, x) in enumerate(zip(blocks.basis.sides, exact, strict=True)):
                left = x[h] - rebuilt[side][n * BLOCK : (n + 1) * BLOCK]
                found[n, side, h] = ((left @ basis.encode[h]) / basis.balance[h]).double().square().sum(-1).mean()
    return found


def limits(blocks, factor=FACTOR):
    return torch.tensor(
        [[bound(side.expected[h], float(side.spectrum[h].sum()), factor) for h in range(HEADS)] for side in blocks.basis.sides]
    ).double()


def test_usual_text_stays_in_the_calibrated_coordinates(case):
    store, blocks = case()
    written = write(blocks, 0, ["usual"] * 5)
    assert blocks.opened == 0
    assert store.monitor.fallback.sum() == 0
    assert (errors(blocks, 0, written).mean(0) <= limits(blocks)).all()
    assert (store.own_means.numel(), store.own_bases.numel()) == (0, 0)
    # what it has summed up is what the stored codes really lose
    summed = torch.tensor(blocks.rows[0].discarded).double() / blocks.rows[0].tokens
    assert torch.allclose(summed, errors(blocks, 0, written).mean(0), rtol=2e-3, atol=1e-6)
    assert blocks.rows[0].tokens == 5 * BLOCK


def test_text_changes_its_kind(case):
    """The block that passes the bound is the last one in the old coordinates; those after it keep the bound of the artifact."""
    store, blocks = case()
    written = write(blocks, 0, ["usual"] * 2 + ["other"] * 4)
    assert blocks.opened == 1
    entries = store.table[0, :, :6]
    assert (entries[:, :, LENGTH] == BLOCK).all()
    assert (entries[0, :3, KEY + OWN_MEAN] == NONE).all() and (entries[0, 3:, KEY + OWN_MEAN] != NONE).all()
    assert len({tuple(e[[KEY + BASIS, KEY + SCALES, KEY + OWN_MEAN]]) for e in entries[0, 3:]}) == 1  # one set for all that follow
    found = errors(blocks, 0, written)
    raw = torch.tensor([[False, False], [False, True]])
    assert (found[:, raw] == 0).all()
    assert (found[2] > limits(blocks))[~raw].all()  # measured as it was discarded
    assert (found[3:].mean(0) <= 1.1 * limits(blocks)).all()
    assert store.monitor.fallback.sum() >= 1
    before = errors(blocks, 0, written[:3])
    assert torch.allclose(before[:2], found[:2])  # codes that are written stay as they are


def test_blocks_after_the_first_fit_into_its_scales(case):
    """Scales taken from 64 tokens must leave room for those that come."""
    _, blocks = case()
    written = write(blocks, 0, ["other"] * 10)
    found = errors(blocks, 0, written)[1:]  # the first one was written before anybody knew
    coded = found[0] > 0
    assert (found[1:].mean(0) < 20 * found[0])[coded].all()


def test_without_a_bound_nothing_opens(case):
    store, blocks = case(factor=0.0)
    written = write(blocks, 0, ["usual", "other", "other"])
    assert blocks.opened == 0
    assert blocks.rows[0].tokens == 0
    assert (errors(blocks, 0, written)[1:].mean(0) > limits(blocks))[0].all()
    assert store.monitor.fallback.sum() == 0


def test_own_coordinates_can_be_left_again(case):
    """Back to the usual kind: the other's own coordinates clip nothing there, but a third kind opens a third set."""
    _, blocks = case()
    first = write(blocks, 0, ["other"] * 3)
    assert blocks.opened == 1
    keys, values = text(blocks, 77)
    more = [(50 * keys, 50 * values)] * 3
    for pair in more:
        blocks.write([0], *(x.unsqueeze(0) for x in pair))
        blocks.store.flush()
    assert blocks.opened == 2
    found = errors(blocks, 0, [*first, *more])
    energy = torch.tensor([[float(side.spectrum[h].sum()) for h in range(HEADS)] for side in blocks.basis.sides])
    assert (found[4:] < 0.02 * 2500 * energy).all()


def test_beams_share_coordinates_until_one_opens_its_own(case):
    store, blocks = case()
    shared = write(blocks, 0, ["usual"] * 2)
    store.select_rows([0, 0])
    blocks.select_rows([0, 0])
    zero = write(blocks, 0, ["other"] * 3, start=10)
    one = write(blocks, 1, ["usual"] * 3, start=10)
    assert blocks.opened == 1
    assert (blocks.rows[0].tokens, blocks.rows[1].tokens) == (2 * BLOCK, 5 * BLOCK)  # the sums are each row's own
    assert store.ids[0, :2].tolist() == store.ids[1, :2].tolist()
    assert (store.table[1, 0, :, KEY + OWN_MEAN][store.ids[1] > 0] == NONE).all()
    assert (errors(blocks, 1, [*shared, *one]).mean(0) <= limits(blocks)).all()
    assert (errors(blocks, 0, [*shared, *zero])[3:].mean(0) <= 1.1 * limits(blocks)).all()
    assert store.monitor.fallback[0].sum() >= 1 and store.monitor.fallback[1].sum() == 0
    # the other way round: the beam with its own coordinates is continued twice, and goes on in them
    store.select_rows([0, 0])
    blocks.select_rows([0, 0])
    again = write(blocks, 1, ["other"], start=30)
    assert blocks.opened == 1
    assert (errors(blocks, 1, [*shared, *zero, *again])[3:].mean(0) <= 1.1 * limits(blocks)).all()
    assert store.own_means.numel() == 3 * DIM


def test_rows_are_told_apart(case):
    """Two rows of different kinds side by side are what each is alone."""
    store, blocks = case(2)
    kinds = (["usual"] * 4, ["other"] * 4)
    written = [[text(blocks, n + 100 * row, kind) for n, kind in enumerate(kinds[row])] for row in range(2)]
    for n in range(4):
        together = [torch.stack(sides) for sides in zip(*(written[row][n] for row in range(2)), strict=True)]
        blocks.write([0, 1], *together)
    store.flush()
    for row in range(2):
        alone, own = case(2)
        for pair in written[row]:
            own.write([row], *(x.unsqueeze(0) for x in pair))
        alone.flush()
        for (k1, v1), (k2, v2) in zip(reconstruct(store.view(False))[row], reconstruct(alone.view(False))[row], strict=True):
            assert torch.allclose(k1, k2, atol=1e-6)
            assert torch.allclose(v1, v2, atol=1e-6)


def test_cropping_never_reaches_coded_text(model, prompts, make_artifact):
    """A window of 32: what may be cropped (what is raw) is never coded, and what is left is as if the rest had never been said."""
    plan = dict.fromkeys(range(LAYERS), PLAN)
    inputs = prompts.batch([[5, prompts.square, 30]])
    said = torch.randint(6, 97, (1, 16 * 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), enable(model, make_artifact(plan=plan, span="all", fallback=2.0), backend="torch") as enabled:

        def read(pieces):
            cache = enabled.new_cache()
            model(**inputs, past_key_values=cache)
            for piece in pieces:
                model(input_ids=piece, past_key_values=cache)
            return cache

        pieces = said.split(16, 1)
        cropped, plain = read(pieces), read(pieces[:-2])
        layer = cropped.layers[0]
        raw, coded = int(layer.store.window.host[0]), layer.store.coded_tokens()
        assert raw >= 32
        assert raw + coded == 5 + 88 + 30 + 16 * 12
        with pytest.raises(RotateKError, match=f"only the newest {raw} are still raw text"):
            cropped.crop(-raw - 1)
        cropped.crop(-32)
        assert layer.store.coded_tokens() == coded  # nothing but the window was touched
        more = said[:, :16]
        a, b = (model(input_ids=more, past_key_values=cache).logits for cache in (cropped, plain))
        assert cropped.get_seq_length() == plain.get_seq_length()
    # blocks may have left one step earlier than where nothing was cropped, so that a few tokens are coded here and raw there
    difference = [layer.store.coded_tokens() for layer in cropped.layers], [layer.store.coded_tokens() for layer in plain.layers]
    if difference[0] == difference[1]:
        assert (a - b).abs().max() < 1e-4
    else:
        assert difference[0][0] - difference[1][0] == 64


def test_a_conversation_changes_its_kind(model, prompts, make_artifact, generate):
    """Through the whole runtime: random bases fit nothing, so every row leaves them, and the error that is left is bounded."""
    plan = dict.fromkeys(range(LAYERS), PLAN)
    inputs = prompts.batch([[5, prompts.square, 40], [90]])
    stock = generate(model, inputs, 1)
    found = {}
    for factor in (0.0, 1.0):
        with enable(model, make_artifact(plan=plan, span="all", fallback=factor), backend="torch"):
            out = generate(model, inputs, 150)
        found[factor] = out.cache.layers[0].blocks.opened, int(sum(layer.store.monitor.fallback.sum() for layer in out.cache.layers))
        assert torch.isfinite(out.logits).all()
        assert (out.logits[:, 0] - stock.logits[:, 0]).abs().max() < 1e-4  # prefill is exact
    assert found[0.0] == (0, 0)
    assert found[1.0][0] >= 2
    assert found[1.0][1] > 0
