"""The calibration pass against numpy, and what it must not depend on: order, batches, padding, interruptions."""

import numpy as np
import pytest
import torch

from rotatek_compile.calibrate import MomentStore, calibrate, output_gram
from rotatek_compile.errors import RotateKError
from rotatek_compile.moments import Moments

IMAGE = 5


@pytest.fixture
def run(tiny, tiny_geometry, tmp_path):
    def calibrated(items, batch_size=1, resume=False, name="a"):
        return calibrate(tiny, items, tiny_geometry, MomentStore({"name": name}, tmp_path), batch_size, resume, 0, True)

    return calibrated


def same(a, b, tolerance=1e-4):
    assert a.sums.keys() == b.sums.keys()
    for name, value in a.sums.items():
        assert torch.allclose(value, b.sums[name], rtol=tolerance, atol=tolerance * float(value.abs().max())), name


def test_against_numpy(run, documents, attention_inputs, tiny):
    moments = run(documents[:3], 1)
    seen = [attention_inputs(item) for item in documents[:3]]
    scaling = 32**-0.5
    for layer in range(3):
        images, everything, texts, queries = [], [], [], np.zeros((2, 32, 32))
        readers = 0
        for item, layers in zip(documents, seen, strict=False):
            q, k, v = (x.double().numpy() for x in layers[layer])
            ids = np.array(item.prompt + item.answer)
            visual = ids == IMAGE
            edges = np.flatnonzero(np.diff(visual.astype(int))) + 1
            images += [k[:, a:b] for a, b in zip(edges[:-1], edges[1:], strict=True) if visual[a]]
            everything.append(k[:, visual])
            texts.append(v[:, ~visual])
            after = q[:, item.visual_end :] * scaling
            readers += after.shape[1]
            for head in range(4):
                queries[head // 2] += after[head].T @ after[head]
        within = sum(x.shape[1] * np.stack([np.cov(h.T, bias=True) for h in x]) for x in images) / sum(x.shape[1] for x in images)
        assert np.allclose(moments.covariance(layer, "visual", "key").numpy(), within, atol=1e-4)
        assert np.allclose(moments.mean(layer, "visual", "key").numpy(), np.concatenate(everything, 1).mean(1), atol=1e-4)
        total = np.stack([np.cov(h.T, bias=True) for h in np.concatenate(texts, 1)])
        assert np.allclose(moments.covariance(layer, "text", "value").numpy(), total, atol=1e-4)
        assert np.allclose(moments.query_moment(layer).numpy(), queries / readers, atol=1e-4)
        weight = tiny.model.language_model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        for head in range(2):
            parts = [weight[:, 32 * g : 32 * (g + 1)] for g in (2 * head, 2 * head + 1)]
            assert np.allclose(moments.output_gram(layer)[head].numpy(), sum(p.T @ p for p in parts), atol=1e-4)
    assert int(moments.sums["0.visual.count"]) == sum(x.shape[1] for x in images)


def test_batches_padding_and_order_do_not_matter(run, documents):
    one = run(documents, 1, name="one")
    same(one, run(documents, 3, name="three"))
    same(one, run(documents[::-1], 2, name="backwards"))


def test_sums_add(run, documents):
    whole, first, second = run(documents, 1, name="w"), run(documents[:2], 1, name="f"), run(documents[2:], 1, name="s")
    for name, value in second.sums.items():
        if not name.endswith("output_gram"):
            first.add(name, value)
    same(whole, first, 1e-12)


def test_interrupted_and_resumed(run, documents, tiny, monkeypatch):
    whole = run(documents, 1, name="whole")
    calls, forward = [], tiny.forward

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            forward(*args, **kwargs)  # its sums are in already, and must not count
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny, "forward", interrupted)
    with pytest.raises(RotateKError, match="2 of 5 documents are saved"):
        run(documents, 1, name="cut")
    monkeypatch.undo()
    assert tiny.config.text_config._attn_implementation == "sdpa"
    resumed = run(documents, 1, resume=True, name="cut")
    assert resumed.documents == 5
    same(whole, resumed, 1e-12)


def test_saved_moments_are_used_again_and_partial_ones_only_on_request(run, documents, tiny, monkeypatch):
    whole = run(documents[:2], 1)
    monkeypatch.setattr(tiny, "forward", None)
    same(whole, run(documents[:2], 1), 0)
    monkeypatch.undo()
    with pytest.raises(RotateKError, match="cover 2 documents, not 1"):
        run(documents[:1], 1)
    fresh, resumed = run(documents[:3], 1), run(documents[:4], 1, resume=True)
    assert (fresh.documents, resumed.documents) == (3, 4)


def test_a_damaged_file_counts_as_nothing(tmp_path):
    store = MomentStore({"a": 1}, tmp_path)
    store.save(Moments({"x": torch.ones(2)}, 3))
    assert store.load().documents == 3
    store.file.write_bytes(store.file.read_bytes()[:20])
    assert store.load().documents == 0
    assert MomentStore({"a": 2}, tmp_path).file != store.file


def test_gram_without_a_plain_matrix(tiny_geometry):
    assert torch.equal(output_gram(torch.nn.Module(), tiny_geometry.layers[0]), torch.eye(32).expand(2, 32, 32))
