"""Captured decoding: the same answers as without, wherever a cache's structure changes, and no capture where the host would be read.

Without a GPU a recorder stands in that runs the recorded step again: as in a graph, nothing on the host is counted in it.
"""

import gc
import warnings
import weakref

import pytest
import torch

from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KIND, Kind
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime import graphs
from rotatek_compile.runtime.backends import TorchBackend
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.graphs import DecodeGraphs
from rotatek_compile.runtime.saved import load_cache
from rotatek_compile.runtime.window import Window

PLAN = [[8, 24], [0, 16], [16, 16]]


class Rerun:
    """Runs the step where a graph would replay it; what it returns is written over what it returned when it was recorded."""

    made = []

    def __init__(self, device, earlier):
        self.earlier, self.replays = earlier, 0
        self.made.append(self)

    def where(self):
        """What a graph would have kept of the cache: where it reads and writes."""
        stores = [layer.segments.store for layer in self.cache().layers]
        return [
            (x.data_ptr(), x.shape)
            for store in stores
            for x in (store.window.buffer, store.window.lengths, store.table_on_device, store.codes, store.scales, store.own_means)
        ]

    def record(self, step):
        outside = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
        call = outside["call"]
        # not the call itself: a graph holds no cache alive
        self.cache, forward, lengths = weakref.ref(call.cache), call.forward, outside["lengths"]
        inputs, kept = outside["inputs"], call.kept

        def again():
            lengths.add_(1)
            return forward(**inputs, **kept, past_key_values=self.cache())

        self.step, self.read = again, self.where()
        output = step()  # for what it returns; a graph would not have run it
        self.output = {name: x for name, x in output.items() if isinstance(x, torch.Tensor)}
        lengths.sub_(1)
        return output

    def replay(self):
        self.replays += 1
        assert self.where() == self.read, "a graph would read and write elsewhere"
        with graphs._capturing(self.cache()):
            again = self.step()
        for name, x in self.output.items():
            x.copy_(again[name])


@pytest.fixture(autouse=True)
def _captured_in_torch(monkeypatch):
    monkeypatch.setattr(TorchBackend, "captures", True)
    monkeypatch.setattr(Rerun, "made", [])
    monkeypatch.setattr(graphs, "STRETCH", 24)
    monkeypatch.setattr(graphs, "STEADY", 2)


@pytest.fixture
def enabled(model, make_artifact):
    """`enable` with the stand-in, or without captures."""

    def make(captured=True, recorder=Rerun, ranks=PLAN, **options):
        found = enable(model, make_artifact(ranks, **options), backend="torch")
        found.graphs = DecodeGraphs(recorder) if captured else None
        return found

    return make


@pytest.mark.parametrize(("span", "ranks"), [("visual", PLAN), ("all", 32)])
def test_the_same_answers(model, ragged, enabled, generate, check_equal, span, ranks):
    """150 tokens: text leaves the windows twice, and some six stretches are captured. It leaves them later than without, so that what is
    coded of it is all there is of it."""
    with enabled(captured=False, span=span, ranks=ranks):
        expected = generate(model, ragged, 150)
    with enabled(span=span, ranks=ranks) as one:
        got = generate(model, ragged, 150)
        assert one.graphs.compared and not one.graphs.off
    check_equal(got, expected, 2e-3 if span == "all" else 1e-4)
    assert 4 <= len(Rerun.made) <= 8 and all(recorder.replays > 10 for recorder in Rerun.made[:-1])
    assert sum(recorder.replays for recorder in Rerun.made) > 110
    assert [recorder.earlier for recorder in Rerun.made[1:]] == Rerun.made[:-1]  # the memory of one stretch goes to the next
    for layer, before in zip(got.cache.layers, expected.cache.layers, strict=True):
        assert (layer.logical_length, layer.real.tolist(), layer.tail) == (before.logical_length, before.real.tolist(), before.tail)
        assert (layer.store.window.host == layer.store.window.lengths.numpy()).all()


def test_coded_text_leaves_windows_between_stretches(model, ragged, enabled, generate):
    """However long the stretch, what is raw is bounded by it."""
    with enabled(span="all", ranks=32):
        got = generate(model, ragged, 150)
    window = got.cache.layers[0].store.window.host
    assert (window >= 32).all() and (window < 32 + 64 + 24 + 8).all()


def test_raw_text_stays_and_the_next_stretch_begins_at_once(model, ragged, enabled, generate):
    """One ordinary step between two stretches, in which windows get room; nothing leaves them."""
    with enabled():
        got = generate(model, ragged, 150)
    for layer in got.cache.layers:
        assert not (layer.store.table[..., KIND] == int(Kind.DENSE)).any()
    replays = [recorder.replays for recorder in Rerun.made]
    assert len(replays) == 5 and sum(replays) + len(replays) - 1 == 149 - 3, replays  # three steps before the first


def next_tokens(model, cache, ids, count):
    """Greedy tokens [B, count] from a prefilled cache, one call each; ids [B, 1] come next."""
    found = []
    for _ in range(count):
        positions = torch.tensor(cache.tokens())[:, None]
        logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, 1)


def read(model, one, inputs):
    cache = one.new_cache()
    first = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return cache, first


@torch.no_grad()
def test_crops_forks_and_rows(model, ragged, enabled):
    """What is done between captured steps is what an ordinary cache would do."""
    with enabled(captured=False) as one:
        cache, first = read(model, one, ragged)
        whole = next_tokens(model, cache, first, 24)
    with enabled() as one:
        cache, first = read(model, one, ragged)
        assert torch.equal(next_tokens(model, cache, first, 10), whole[:, :10]) and len(Rerun.made) == 1
        cache.crop(-3)
        assert torch.equal(next_tokens(model, cache, whole[:, 6:7], 5), whole[:, 7:12])
        assert len(Rerun.made) == 1  # a crop changes lengths alone
        copied = cache.fork()
        assert torch.equal(next_tokens(model, cache, whole[:, 11:12], 4), whole[:, 12:16])
        assert torch.equal(next_tokens(model, copied, whole[:, 11:12], 6), whole[:, 12:18])
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert torch.equal(next_tokens(model, cache, whole[[2, 0], 15:16], 8), whole[[2, 0], 16:24])
        assert torch.equal(next_tokens(model, copied, whole[:, 17:18], 6), whole[:, 18:24])
        assert 3 <= len(Rerun.made) <= 4


@torch.no_grad()
def test_saved_and_loaded(model, ragged, enabled, tmp_path):
    with enabled(captured=False) as one:
        cache, first = read(model, one, ragged)
        whole = next_tokens(model, cache, first, 16)
    with enabled() as one:
        cache, first = read(model, one, ragged)
        next_tokens(model, cache, first, 8)
        cache.save(tmp_path / "cache")
        twin, _ = load_cache(tmp_path / "cache", one)
        assert torch.equal(next_tokens(model, cache, whole[:, 7:8], 8), whole[:, 8:])
        assert torch.equal(next_tokens(model, twin, whole[:, 7:8], 8), whole[:, 8:])


def test_beams_are_not_captured(model, prompts, enabled, generate, check_equal):
    """Rows are selected after every step."""
    inputs = prompts.batch([[3, prompts.square, 40]])
    options = {"num_beams": 3, "num_return_sequences": 3}
    with enabled(captured=False):
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1, **options)
    with enabled():
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1, **options), expected)
    assert not Rerun.made


def test_a_model_that_counts_on_the_host(model, ragged, enabled, generate, check_equal, monkeypatch):
    """Its captured step would go on using one length: found at the second replay, before a wrong answer is given."""
    forward = model.model.forward

    def counting(*args, past_key_values=None, **kwargs):
        out = forward(*args, past_key_values=past_key_values, **kwargs)
        if Rerun.made and past_key_values.state.capturing:
            length = Rerun.made[-1].__dict__.setdefault("length", past_key_values.get_seq_length())
        else:
            length = past_key_values.get_seq_length() - 1
        out.last_hidden_state = out.last_hidden_state * (1 + 0.05 * length)
        return out

    monkeypatch.setattr(model.model, "forward", counting)
    with enabled(captured=False):
        expected = generate(model, ragged, 20)
    with enabled() as one, pytest.warns(UserWarning, match="without CUDA graphs.*a captured step of this model differs"):
        got = generate(model, ragged, 20)
        assert one.graphs.off and len(Rerun.made) == 1 and Rerun.made[0].replays == 2
    check_equal(got, expected, 1e-3)


class Refuses(Rerun):
    def record(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_step_that_cannot_be_captured(model, ragged, enabled, generate, check_equal):
    with enabled(captured=False):
        expected = generate(model, ragged, 12)
    with enabled(recorder=Refuses), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = generate(model, ragged, 12)
    check_equal(got, expected)
    found = [str(one.message) for one in said if "CUDA graph" in str(one.message)]
    assert len(found) == 1 and found[0].endswith("(operation not permitted when stream is capturing)")


def test_a_step_that_returns_hidden_states(model, ragged, enabled, generate, check_equal, monkeypatch):
    """What is captured would be written over by the next step."""
    with enabled(captured=False):
        expected = generate(model, ragged, 12)
    text = model.config.get_text_config()
    monkeypatch.setattr(text, "output_hidden_states", True)
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    with enabled() as one, pytest.warns(UserWarning, match="returns more than logits by name"):
        got = generate(model, ragged, 12)
        assert one.graphs.off
    check_equal(got, expected)


def test_no_memory_for_a_stretch(model, ragged, enabled, generate, check_equal, monkeypatch):
    """Half of the layers have room when it runs out; nothing is lost."""
    reserve, asked = Window.reserve, []

    def scarce(self, tokens):
        asked.append(tokens)
        if tokens == graphs.STRETCH and asked.count(tokens) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(self, tokens)

    with enabled(captured=False):
        expected = generate(model, ragged, 30)
    monkeypatch.setattr(Window, "reserve", scarce)
    with enabled() as one, pytest.warns(UserWarning, match="no memory for more raw text") as said:
        got = generate(model, ragged, 30)
        assert not one.graphs.off and not Rerun.made
        assert len([warning for warning in said if "raw text" in str(warning.message)]) == 1
        check_equal(generate(model, ragged, 30), expected)
        assert len(Rerun.made) > 0  # another cache may have room
    check_equal(got, expected)


def test_a_captured_cache_is_given_back(model, ragged, enabled, generate):
    with enabled() as one:
        kept = [weakref.ref(generate(model, ragged, 20).cache) for _ in range(3)]
        assert len(Rerun.made) >= 3
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3 and not one.graphs.histories


@pytest.mark.parametrize("text", [86, 88, 89, 92])
def test_text_that_is_due_to_leave(model, prompts, enabled, text):
    """It stays while a step is compared, although coding it would change what comes."""
    inputs = prompts.batch([[3, prompts.square, text]])
    with enabled(span="all", plan=[[HeadPlan(Slabs(0, 0, 16), Slabs(0, 0, 16))] * 2] * 3) as one, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=-1)
        assert one.graphs.compared and not one.graphs.off


def test_logits_of_tokens_that_never_come(model, ragged, enabled, generate):
    def masked(module, given, out):
        out[..., 5] = -torch.inf
        return out

    hook = model.lm_head.register_forward_hook(masked)
    try:
        with enabled() as one:
            generate(model, ragged, 20)
            assert one.graphs.compared and not one.graphs.off and Rerun.made
    finally:
        hook.remove()


def test_rows_whose_text_leaves_at_different_times(model, prompts, enabled, generate, check_equal):
    """Twelve rows of other lengths: hardly a step at which no text is due to leave."""
    inputs = prompts.batch([[3, prompts.square, 60 + 5 * n] for n in range(12)])
    with enabled(captured=False):
        expected = generate(model, inputs, 70)
    with enabled():
        got = generate(model, inputs, 70)
    check_equal(got, expected)
    assert sum(recorder.replays for recorder in Rerun.made) > 50


@torch.no_grad()
def test_another_setting_or_shape_is_captured_anew(model, ragged, enabled):
    with enabled() as one:
        cache, ids = read(model, one, ragged)
        next_tokens(model, cache, ids, 8)
        places = torch.tensor(cache.tokens())[:, None]
        kept = model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True).logits
        before = kept.clone()
        replays = Rerun.made[0].replays
        model(input_ids=ids, position_ids=places + 1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert (len(Rerun.made), Rerun.made[0].replays) == (1, replays)
        for n in range(4):
            model(input_ids=ids, position_ids=places + 2 + n, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert len(Rerun.made) == 2 and Rerun.made[1].replays > 0
        assert torch.equal(kept, before)  # what was given out stays


@torch.no_grad()
def test_another_turn_is_captured_anew(model, ragged, enabled):
    """Adapters may have been changed in between."""
    with enabled(captured=False) as one:
        cache, first = read(model, one, ragged)
        next_tokens(model, cache, first, 8)
        model(input_ids=first.repeat(1, 5), position_ids=torch.tensor(cache.tokens())[:, None] + torch.arange(5), past_key_values=cache)
        expected = next_tokens(model, cache, first, 8)
    with enabled() as one:
        cache, first = read(model, one, ragged)
        next_tokens(model, cache, first, 8)
        model(input_ids=first.repeat(1, 5), position_ids=torch.tensor(cache.tokens())[:, None] + torch.arange(5), past_key_values=cache)
        assert len(Rerun.made) == 1 and torch.equal(next_tokens(model, cache, first, 8), expected) and len(Rerun.made) == 2


@pytest.mark.parametrize("changed", [{"output_attentions": True}, {"position_ids": None}, {"return_dict": False}, {"labels": 17}])
@torch.no_grad()
def test_calls_that_need_the_host(model, ragged, enabled, changed):
    with enabled() as one:
        cache, ids = read(model, one, ragged)
        for _ in range(8):
            given = {"position_ids": torch.tensor(cache.tokens())[:, None], **changed}
            if "labels" in given:
                given["labels"] = torch.full_like(ids, 17)
            model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
    assert not Rerun.made


def test_gradients_are_not_captured(model, ragged, enabled):
    with enabled() as one, torch.no_grad():
        cache, ids = read(model, one, ragged)
        next_tokens(model, cache, ids, 8)
        assert len(Rerun.made) == 1 and Rerun.made[0].replays > 3
        with torch.enable_grad():
            before = Rerun.made[0].replays
            next_tokens(model, cache, ids, 2)
    assert Rerun.made[0].replays == before


def test_it_can_be_left_out(model, make_artifact):
    for asked in (True, False):
        with enable(model, make_artifact(), backend="torch", graphs=asked) as one:
            assert (one.graphs is not None) == asked
