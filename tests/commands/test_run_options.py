"""rotatek-run beyond a page and a question: other budgets, videos, adapters, attention implementations."""

import importlib.util
import json
import sys

import pytest

from rotatek_compile.runtime import enable as enable_module

ASK = ("--prompt", "What?", "--max-new-tokens", 5, "--device", "cpu", "--json")


@pytest.fixture
def page(data_file):
    return data_file.parent / "page0.png"


def test_another_budget(cli, compiled, page):
    """More directions take more bytes; at ratio 1 nothing is lost; a budget codes Values too."""
    ran = {}
    for option in (("--keep-ratio", 0.25), ("--keep-ratio", 1), ("--kv-budget", 0.125)):
        ended = cli("run", compiled, "--image", page, *ASK, "--compare-dense", "--no-fallback", *option)
        assert ended.code == 0, ended.err
        ran[option] = json.loads(ended.out)
    full = ran["--keep-ratio", 1]
    assert full["text"] == full["dense"]["text"]
    assert ran["--kv-budget", 0.125]["kv_bytes"] < ran["--keep-ratio", 0.25]["kv_bytes"] < full["kv_bytes"]


def test_a_document_of_a_data_set(cli, compiled, data_file, page):
    """Its pages and its question, as if they were named; what the data set takes for right stands beside the answer."""
    rest = ("--max-new-tokens", 5, "--device", "cpu", "--no-fallback")
    ended = cli("run", compiled, "--data", data_file, "--sample", 1, *rest, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    row = json.loads(data_file.read_text().splitlines()[1])
    assert found["document"]["question"] == row["question"] and "/1-" in found["document"]["id"]
    pages = [word for name in row["images"] for word in ("--image", page.parent / name)]
    same = cli("run", compiled, *pages, "--prompt", row["question"], *rest, "--json")
    assert found["text"] == json.loads(same.out)["text"]
    shown = cli("run", compiled, "--data", data_file, *rest)
    first = json.loads(data_file.read_text().splitlines()[0])
    assert first["question"] in shown.out.splitlines()[0] and shown.out.splitlines()[-1] == f"right: {' or '.join(first['answers'])}"
    other = cli("run", compiled, "--data", data_file, "--prompt", "Why?", *rest)
    assert other.out.splitlines()[0].endswith(": Why?") and "right:" not in other.out
    held = len(data_file.read_text().splitlines())
    for number in (held, 99):
        said = cli("run", compiled, "--data", data_file, "--sample", number, *rest).sentence(2)
        assert f"--sample {number} is out of range" in said and f"has {held} documents, and the first is 0" in said


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--keep-ratio", 2), "--keep-ratio 2 is out of range", 2),
        (("--kv-budget", 0.001), "--kv-budget 0.001 is too small", 2),
        (("--keep-ratio", 0.5, "--kv-budget", 0.7), "say the same thing", 2),
        (("--fps", 2), "--fps 2 belongs to --video", 2),
        (("--video", "nowhere.mp4"), "video nowhere.mp4 does not exist", 1),
    ],
)
def test_refused_before_weights_are_loaded(cli, compiled, page, monkeypatch, options, words, code):
    from rotatek_compile import api

    monkeypatch.setattr(api, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert words in cli("run", compiled, "--image", page, *ASK, *options).sentence(code)


def test_a_video_for_a_model_that_takes_none(cli, compiled, data_file):
    ended = cli("run", compiled, "--video", data_file.parent, *ASK)  # three pictures of different sizes
    assert "differ in size" in ended.sentence()


def test_frames_for_a_model_that_takes_no_video(cli, compiled, page, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(page.read_bytes())
    assert "LlavaNextProcessor takes no videos; pass frames as images instead" in cli("run", compiled, "--video", tmp_path, *ASK).sentence()


def test_without_torchvision(cli, page, tmp_path, data_file):
    """tiny-qwen3-vl reads videos where torchvision is installed, and says so where it is not."""
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    from rotatek_compile.answer import model_inputs
    from rotatek_compile.errors import RotateKError
    from rotatek_compile.models import load_processor, resolve
    from rotatek_compile.video import read_clip

    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "1.png").write_bytes(page.read_bytes())
    with pytest.raises(RotateKError, match="videos need torchvision, which is not installed here"):
        model_inputs(load_processor(resolve("tiny-qwen3-vl")), [], "What happens?", read_clip(frames, 4))


def test_attention_implementation(cli, compiled, page, monkeypatch):
    seen = []
    register = enable_module.register
    monkeypatch.setattr(enable_module, "register", lambda name: (seen.append(name), register(name))[1])
    eager, plain = (cli("run", compiled, "--image", page, *ASK, *more) for more in (("--attn-implementation", "eager"), ()))
    assert seen == ["eager", "sdpa"]
    assert json.loads(eager.out)["text"] == json.loads(plain.out)["text"]
    if importlib.util.find_spec("flash_attn") is None:
        ended = cli("run", compiled, "--image", page, *ASK, "--attn-implementation", "flash_attention_2")
        assert "attention implementation 'flash_attention_2' cannot be used" in ended.sentence()


def test_an_adapter(cli, compiled, checkpoint, page, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForImageTextToText

    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    model.save_pretrained(tmp_path)
    ended = cli("run", compiled, "--image", page, *ASK, "--adapter", tmp_path, "--keep-ratio", 1, "--compare-dense")
    found, plain = json.loads(ended.out), json.loads(cli("run", compiled, "--image", page, *ASK).out)
    assert found["text"] == found["dense"]["text"] != plain["text"]
    assert "carries the adapter" in ended.err


def test_an_adapter_without_peft(cli, compiled, page, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    assert "needs the package peft: pip install peft" in cli("run", compiled, "--image", page, *ASK, "--adapter", "somewhere").sentence()
