"""Every example of docs/generation.md runs: Python blocks one after another, commands through their entry points."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
ABSENT = ("needs the package av", "takes no videos", "does not exist")  # what a machine, or this model, may lack


@pytest.fixture
def here(compiled, data_file, tmp_path, monkeypatch):
    """A folder with the files that the page names."""
    (tmp_path / "artifact").symlink_to(compiled)
    (tmp_path / "page1.png").symlink_to(data_file.parent / "page1.png")
    (tmp_path / "frames").mkdir()
    for number in range(3):
        (tmp_path / "frames" / f"{number}.png").symlink_to(data_file.parent / "page1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python(here, compiled):
    from PIL import Image

    from rotatek_compile.answer import model_inputs
    from rotatek_compile.api import load_base
    from rotatek_compile.artifact import read_artifact

    model, processor = load_base(read_artifact(compiled), device="cpu")
    model.generation_config.max_new_tokens = 3
    names = {"model": model, "processor": processor, "inputs": model_inputs(processor, [Image.open("page1.png")], "What is it?")}
    usual = [block for block in blocks("python") if "liger_kernel" not in block]
    assert len(usual) == 3
    for block in usual:
        if not hasattr(model, "_supports_mm_encoder_outputs"):
            block = "\n".join(line for line in block.splitlines() if "prefill_chunk_size" not in line)
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page


@pytest.mark.filterwarnings("ignore")
def test_other_kernels(here, monkeypatch):
    """The block about liger-kernel, with stand-ins for the package's parts and this checkpoint's language model, a Llama."""
    from transformers.models.llama import modeling_llama as modeling

    class Norm(modeling.LlamaRMSNorm): ...

    class Mlp(modeling.LlamaMLP): ...

    def rope(q, k, cos, sin, unsqueeze_dim=1, rope=modeling.apply_rotary_pos_emb):
        return rope(q, k, cos, sin, unsqueeze_dim)

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    parts = types.SimpleNamespace(LigerRMSNorm=Norm, LigerSwiGLUMLP=Mlp, liger_rotary_pos_emb=rope)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", parts)
    (block,) = (block for block in blocks("python") if "liger_kernel" in block)
    for there, here_it_is in {"mistral": "llama", "Mistral": "Llama", '"cuda"': '"cpu"'}.items():
        assert there in block
        block = block.replace(there, here_it_is)
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    assert modeling.apply_rotary_pos_emb is rope
    text = names["model"].model.language_model
    assert type(text.norm) is Norm and type(text.layers[0].mlp) is Mlp


def test_commands(here, cli):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line, comments=True)
        ended = cli(words[0].removeprefix("rotatek-"), *words[1:], "--device", "cpu", "--max-new-tokens", 3)
        if ended.code:
            assert any(reason in ended.sentence() for reason in ABSENT), ended.err
        else:
            assert "KV cache" in ended.out
