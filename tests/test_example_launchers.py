"""Examples that need several processes (docs/scale.md) or train (docs/backbones.md): run small, arguments as the pages write them."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("rotatek_launched_commands", ROOT / "tests" / "example_commands.py")
running = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = running
_spec.loader.exec_module(running)
SMALL, parse, reading = running.SMALL, running.parse, running.reading
BIN = Path(sys.executable).parent
TINY = "hidden=32,head_dim=16,feed_forward=48,vision_hidden=64,vision_layers=1,vision_feed_forward=64"
FEW = ["--device", "cpu", "--no-compile", "--workers", "0", "--eval-documents", "0", "--pages-per-step", "2", "--length", "64",
       "--max-steps", "1"]  # fmt: skip

# what the block of docs/scale.md takes as given; every `generate` adds 3 tokens and its cache to `filled`
GIVEN = """
import torch, rotatek_compile
from PIL import Image
from transformers import AutoModelForImageTextToText, GenerationMixin
from rotatek_compile.answer import model_inputs
from rotatek_compile.runtime.accounting import cache_bytes
torch.set_num_threads(1)
stock, filled = GenerationMixin.generate, []
def generate(self, **options):
    out = stock(self, **options, min_new_tokens=3, max_new_tokens=3, return_dict_in_generate=True)
    filled.append((out.past_key_values, out.sequences.shape[1] - options["input_ids"].shape[1]))
GenerationMixin.generate = generate
name = "CHECKPOINT"
"""
ASKED = """
inputs = model_inputs(processor, [Image.open("page.png")], "What is the total?")
model.generate(**inputs)
"""
COUNTED = """
for cache, tokens in filled:
    count = cache_bytes(cache)
    print(f"{count.total} of {count.dense} bytes in {cache.layers[0].store.heads} heads, {tokens} tokens\\n", end="", flush=True)
"""


def launched(words):
    """The words of our command under a launcher, which the launcher's own parser finds."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        told = get_args_parser().parse_args(words[1:])
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[:2] == ["accelerate", "launch"]
        told = launch_command_parser().parse_args(words[2:])
    assert told.no_python
    return [told.training_script, *told.training_script_args]


def ours(example):
    """Parsed by the launcher, and what it starts by our command; the processes are run in test_parallel.py and test_tensor_parallel.py."""
    text = example.text.replace("--nproc-per-node N", "--nproc-per-node 2")
    words = launched(text.split() if text.endswith("...") else reading.Example("", 0, "", text).words)
    quoted = " ".join(word if re.fullmatch(r"[\w./:-]+", word) else repr(word) for word in words)
    parse(reading.Example(example.page, example.line, "inline", quoted))


def start(words, here):
    """A launcher's command in real processes; its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run([BIN / words[0], *map(str, words[1:])], cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_scale(checkpoint, data_file, tmp_path):
    def compile_in_two(example):
        words = [{"tiny-llava-next": checkpoint, "mixed": data_file}.get(word, word) for word in example.words]
        said = json.loads(start([*words, *SMALL["compile"]], tmp_path))  # one voice
        made = {file.name for file in (tmp_path / "artifact").iterdir()}
        assert said["artifact"] == "artifact" and made >= {"rotatek_config.json", "rotatek.safetensors", "report.json"}

    def python(example):
        shutil.copy(data_file.parent / "page1.png", tmp_path / "page.png")
        loaded, distributed = example.text.split("\n\n")
        given = GIVEN.replace("CHECKPOINT", str(checkpoint))
        (tmp_path / "block.py").write_text(f"{given}{loaded}\n{ASKED}{distributed}\n{COUNTED}", encoding="utf-8")
        said = start(["torchrun", "--standalone", "--nproc-per-node", 2, "block.py"], tmp_path)
        shares = [tuple(map(int, share)) for share in re.findall(r"(\d+) of (\d+) bytes in 1 heads, 3 tokens", said)]
        assert len(shares) == 4 and all(total < dense for total, dense in shares)  # two models in each of two processes
        assert len({dense for _, dense in shares}) == 1  # one of two heads each, for the same tokens

    compiling = "torchrun --standalone --nproc-per-node 2 --no-python rotatek-compile --model tiny-llava-next --calib mixed -o artifact"
    handlers = {"torchrun": ours, "accelerate": ours, "rotatek": parse, "python block": python}
    reading.play("docs/scale.md", handlers, {compiling: compile_in_two})


def test_readme_names_the_launcher():
    [example] = [example for example in reading.examples("README.md") if example.text.startswith("torchrun")]
    ours(example)


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    script = importlib.import_module("train_tiny_vlm")
    monkeypatch.setattr(script, "probe", lambda *_: {})  # slow; test_probe.py
    return script


def test_backbones(trainer, tmp_path, monkeypatch, capsys):
    """The three steps, one after another: each begins with what the one before wrote. What they say is what was run (training logs)."""
    monkeypatch.chdir(tmp_path)
    logs = {255: "1_narrow", 240: "2_copied", 225: "3_five_layers"}
    places = iter([["--output", "OUTPUT1", "--work", "WORK1"], ["--output", "OUTPUT2", "--work", "WORK2"],
                   ["--output", "OUTPUT3", "--work", "WORK3"]])  # fmt: skip
    first = "python tools/train_tiny_vlm.py --family llava_next"

    def train(example):
        words = example.text.removesuffix(" ...").replace("... ", f"{first} ", 1).split()
        assert " ".join(words).startswith(first)
        place = next(places)
        monkeypatch.setattr(sys, "argv", [*words[1:], *place])
        said = trainer.parse_arguments()
        log = json.loads((ROOT / "tools" / "training_logs" / f"tiny_llava_next_{logs[said.seconds]}.json").read_text(encoding="utf-8"))
        for name, value in log["settings"].items():
            if f"--{name.replace('_', '-')}" in words:
                assert str(getattr(said, name)) == value, (str(example), name)
        geometry = ",".join(part for part in (said.geometry, TINY) if part)
        sys.argv.extend(["--geometry", geometry, *FEW])
        trainer.main()
        assert (Path(place[1]) / "model.safetensors").exists() and (Path(place[3]) / "state.pt").exists()
        heads = re.findall(r"every head of .* stands (\d) times", capsys.readouterr().out)
        assert heads == ([] if said.begin_with is None else ["4" if said.begin_with.name == "state.pt" else "1"])
        config = json.loads((Path(place[1]) / "config.json").read_text(encoding="utf-8"))["text_config"]
        expected = {255: (6, 1), 240: (6, 4), 225: (5, 4)}[said.seconds]  # layers and KV heads that the page tells
        assert (config["num_hidden_layers"], config["num_key_value_heads"]) == expected

    special = {"rotatek-inspect ARTIFACT": parse}
    reading.play("docs/backbones.md", {"python": train, "...": train}, special)
    assert next(places, None) is None
