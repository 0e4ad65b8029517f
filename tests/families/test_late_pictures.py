"""Pictures that join a conversation on a model with M-RoPE: with the positions that docs/generation.md names it is as one prompt."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from builders import BUILDERS, VISION, missing  # noqa: E402
from family_artifacts import FULL, artifact  # noqa: E402
from modes import Subject, second_image  # noqa: E402

from rotatek_compile.geometry import geometry_of  # noqa: E402
from rotatek_compile.runtime.document import Document  # noqa: E402
from rotatek_compile.runtime.enable import enable  # noqa: E402
from rotatek_compile.runtime.media import at_text_positions  # noqa: E402
from rotatek_compile.runtime.saved import load_cache  # noqa: E402

LATE = "a picture that joins a conversation stands at positions of text"


@pytest.fixture(params=["qwen2.5-vl", "qwen3-vl"])
def subject(request):
    if package := missing(request.param):
        pytest.skip(f"its processor needs {package}")
    model, processor = BUILDERS[request.param]()
    torch.set_num_threads(1)
    return Subject(request.param, model.float().eval(), processor, True)


@torch.no_grad()
def test_positions_of_the_whole(subject):
    """Two turns with a picture each, with and without positions, beside the same tokens in one prompt."""
    model = subject.model
    first, second = subject.one(seed=0), subject.one("And this?", seed=3)
    with enable(model, artifact(geometry_of(model.config), FULL, "visual"), backend="torch") as enabled, warnings.catch_warnings():
        warnings.filterwarnings("error", message=LATE)

        def turns(**more):
            cache = enabled.new_cache()
            answer = subject.generate(first, 4, past_key_values=cache).tokens
            carried = torch.zeros_like(answer[:, -1:])
            types = torch.cat([carried, second["mm_token_type_ids"]], 1)
            rest = {name: second[name] for name in ("pixel_values", "image_grid_thw")} | {"mm_token_type_ids": types}
            ids = torch.cat([answer[:, -1:], second["input_ids"]], 1)
            mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.int64)
            whole = {"input_ids": torch.cat([first["input_ids"], answer, second["input_ids"]], 1), "attention_mask": mask}
            whole["mm_token_type_ids"] = torch.cat([first["mm_token_type_ids"], torch.zeros_like(answer), second["mm_token_type_ids"]], 1)
            whole["image_grid_thw"] = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
            if more:
                places = model.model.get_rope_index(**whole)[0][..., cache.get_seq_length() :]
                assert places.shape[-1] == ids.shape[1]
                rest["position_ids"] = places
            pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
            got = subject.generate({"input_ids": ids, "attention_mask": mask} | rest, 3, past_key_values=cache).logits
            return got, subject.generate(whole | {"pixel_values": pixels}, 3).logits

        got, one_prompt = turns(positions=True)
        assert torch.equal(got.isfinite(), one_prompt.isfinite())  # placeholders are never written
        assert float((got - one_prompt).nan_to_num(0.0).abs().max()) < 1e-4  # also where the answer goes on
        with pytest.warns(UserWarning, match=LATE):
            wrong, one_prompt = turns()
        assert float((wrong - one_prompt)[:, 0].nan_to_num(0.0).abs().max()) > 1e-2


@torch.no_grad()
def test_a_saved_conversation_goes_on_where_it_was(subject, tmp_path):
    """A document's cache, a picture that joins it with positions, a file, another prompt in between: as one prompt, by plain generate."""
    model = subject.model
    first, second, question = subject.one(seed=0), subject.one("And this?", seed=3), torch.tensor([[7, 8, 9]])
    with enable(model, artifact(geometry_of(model.config), FULL, "visual"), backend="torch") as enabled:
        cache = Document.read(model, **first).cache
        whole = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["mm_token_type_ids"] = torch.cat([first["mm_token_type_ids"], second["mm_token_type_ids"]], 1)
        whole["image_grid_thw"] = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
        places, deltas = model.model.get_rope_index(**whole)
        own = {name: second[name] for name in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")}
        before = cache.rope_deltas.clone()
        model(**own, position_ids=places[..., cache.get_seq_length() :], past_key_values=cache)
        assert torch.equal(cache.rope_deltas, deltas) and not torch.equal(before, deltas)
        cache.save(tmp_path / "cache")

        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        whole["input_ids"] = torch.cat([whole["input_ids"], question], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(question)], 1)
        expected = subject.generate(whole | {"pixel_values": pixels}, 3)
        for one in (cache.fork(), load_cache(tmp_path / "cache", enabled)[0]):
            subject.generate(subject.one("Something else?", seed=5), 2)  # leaves its own number on the model
            mask = torch.ones(1, one.get_seq_length() + 3, dtype=torch.int64)
            got = subject.generate({"input_ids": question, "attention_mask": mask}, 3, past_key_values=one)
            assert float((got.logits - expected.logits).nan_to_num(0.0).abs().max()) < 1e-4
        subject.generate(subject.one("Something else?", seed=5), 2)
        found = model(input_ids=question, past_key_values=cache).logits[:, -1]  # a plain call, too
        assert float((found - expected.logits[:, 0]).nan_to_num(0.0).abs().max()) < 1e-4
        cache.reset()
        assert cache.rope_deltas is None  # of what it held, and not of what it is to hold


@pytest.mark.filterwarnings("ignore:.*eos_token_id")
def test_other_models_number_no_pictures():
    """Models without M-RoPE are not warned about."""
    name = next(name for name in VISION if not name.startswith("qwen") and not missing(name))
    model, processor = BUILDERS[name]()
    subject = Subject(name, model.float().eval(), processor, True)
    with enable(model, artifact(geometry_of(model.config), FULL, "visual"), backend="torch"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=LATE)
        second_image(subject)


def test_what_is_a_text_position():
    kinds = np.array([[0, 1, 1, 0], [0, 0, 2, 2]], dtype=np.int8)
    text = torch.arange(4).expand(3, 2, 4)
    assert at_text_positions(text, kinds) and at_text_positions(None, kinds) and at_text_positions(text[0], kinds)
    assert not at_text_positions(None, np.zeros((2, 4), dtype=np.int8))  # no picture
    assert not at_text_positions(text, np.array([[0, 1, 0, 0]], dtype=np.int8))  # one token: its axes are alike
    grid = text.clone()
    grid[2, 1, 3] += 1
    assert not at_text_positions(grid, kinds)
    assert not at_text_positions(torch.cat([text[:1], grid]), kinds)  # with one of text before them
