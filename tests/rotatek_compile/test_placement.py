"""A model that accelerate has spread: layers whose weights wait on disk calibrate, are measured and decode like the whole model."""

import pytest
import torch

from rotatek_compile import models
from rotatek_compile.bases import pca
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.cutter import Cutter
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.placement import input_device
from rotatek_compile.runtime.enable import enable
from rotatek_compile.sensitivity import measure


@pytest.fixture(scope="module")
def spread(tiny, tmp_path_factory):
    """The tiny model with its embedding, its second layer and its head on disk, the rest in main memory."""
    folder = tmp_path_factory.mktemp("spread")
    tiny.save_pretrained(folder / "model")
    text = "model.language_model"
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.image_newline": "cpu", "lm_head": "disk"}
    places |= {f"{text}.embed_tokens": "disk", f"{text}.norm": "cpu", f"{text}.rotary_emb": "cpu"}
    places |= {f"{text}.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    model = type(tiny).from_pretrained(folder / "model", dtype=torch.float32, device_map=places, offload_folder=folder / "weights").eval()
    model.generation_config = tiny.generation_config
    assert model.model.language_model.layers[1].self_attn.o_proj.weight.is_meta
    return model


def test_inputs_go_where_the_embedding_is_computed(tiny, spread):
    assert spread.get_input_embeddings().weight.is_meta
    assert input_device(spread) == input_device(tiny) == torch.device("cpu")


def test_moments(tiny, spread, tiny_geometry, documents, tmp_path):
    found = [
        calibrate(model, documents[:3], tiny_geometry, MomentStore({"n": n}, tmp_path), 2, False, 0, True)
        for n, model in enumerate((tiny, spread))
    ]
    assert found[0].sums.keys() == found[1].sums.keys()
    for name, value in found[0].sums.items():
        assert torch.allclose(found[1].sums[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max())), name
    assert float(found[1].output_gram(1).diagonal(dim1=1, dim2=2).min()) > 0.1  # of weights on disk; the identity's is elsewhere zero
    assert not torch.equal(found[1].output_gram(1)[0], torch.eye(32).double())


def test_sensitivities(tiny, spread, tiny_geometry, documents):
    generator = torch.Generator().manual_seed(0)
    bases = {i: pca(a @ a.mT) for i, a in enumerate(torch.randn(3, 2, 32, 32, generator=generator))}
    levels = (Slabs(), Slabs(8))
    cutters = (Cutter(model, tiny_geometry, bases, False, bases) for model in (tiny, spread))
    one, other = (measure(cutter, documents[:2], levels, True) for cutter in cutters)
    for first, second in ((one.key, other.key), (one.value, other.value)):
        for layer, table in first.items():
            assert table.max() > 1e-4
            assert torch.allclose(second[layer], table, rtol=1e-3, atol=1e-7)


def test_decoding(tiny, spread, documents, make_artifact):
    inputs = {"input_ids": torch.tensor([documents[1].prompt]), **documents[1].media}
    made = []
    for model in (tiny, spread):
        with enable(model, make_artifact(16)):
            made.append(
                model.generate(
                    **inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True
                )
            )
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert (torch.stack(made[0].logits) - torch.stack(made[1].logits)).abs().max() < 1e-4


def test_auto_on_a_machine_without_a_gpu(checkpoint):
    assert models.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        pytest.skip("a GPU takes the whole model")
    model = models.load_model(models.resolve(str(checkpoint)), torch.float32, torch.device("cpu"), spread=True)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert not model.training
