"""A decoding step under torch.compile(fullgraph=True), over a cache that stands as it does while steps are captured."""

import shutil

import pytest
import torch

from rotatek_compile.runtime import graphs
from rotatek_compile.runtime.backends import TritonBackend
from rotatek_compile.runtime.enable import enable

BACKEND = "inductor" if shutil.which("c++") else "aot_eager"  # inductor needs a compiler on a CPU; it alone writes in place


@pytest.fixture
def compiled_anew():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:decoding with the torch backend")
@torch.no_grad()
def test_one_graph_for_every_step(model, ragged, make_artifact, compiled_anew):
    """Nothing breaks the graph and nothing is compiled anew as the text grows; logits are those of plain steps on the torch backend."""
    logits = []
    for compiled in (False, True):
        with enable(model, make_artifact([[8, 24], [0, 16], [16, 16]]), backend="torch", graphs=False) as enabled:
            if compiled:
                enabled.backend = TritonBackend()  # on a CPU its operator attends by the specification
            cache = enabled.new_cache()
            out = model(**ragged, past_key_values=cache, use_cache=True)
            places = torch.tensor(cache.tokens())[:, None]
            forward = model.forward.__wrapped__
            found = []

            def step(ids, places, forward=forward, cache=cache):
                return forward(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True).logits

            if compiled:
                lengths = graphs._reserve(cache.layers)
                step = torch.compile(step, fullgraph=True, backend=BACKEND)
                cache.state.capturing = True
            for number in range(4):
                ids = torch.full_like(places, 7 + number)
                if compiled:
                    lengths.add_(1)
                    found.append(step(ids, places + number))
                else:
                    found.append(model(input_ids=ids, position_ids=places + number, past_key_values=cache, use_cache=True).logits)
            logits.append(torch.cat([out.logits[:, -1:], *found], 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(*logits, atol=1e-4) and logits[0].std() > 0.1
