"""Every example of README, CONTRIBUTING and docs runs: read out of the pages here, so that a new one without a test fails.

Commands of ours run in this process as they are written, with options appended that keep them quick. What a page's own test runs elsewhere
is named in ELSEWHERE. What takes a launcher, many documents or a GPU is in test_example_launchers.py, or parsed by the real parser.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("rotatek_example_commands", ROOT / "tests" / "example_commands.py")
running = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = running
_spec.loader.exec_module(running)
caches, command, here, make, parse_script = running.caches, running.command, running.here, running.make, running.parse_script  # fixtures
SMALL, load, parse, reading, total = running.SMALL, running.load, running.parse, running.reading, running.total
server = load("rotatek_hub_fixtures", "tests/hub_fixtures.py").server  # a Hub of our own
builders = load("rotatek_family_builders", "tests/families/builders.py")
play = reading.play

PLAYED = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/ask_many.md",
    "docs/codec.md",
    "docs/data.md",
    "docs/decode.md",
    "docs/evidence.md",
    "docs/families.md",
    "docs/generation.md",
    "docs/hub.md",
    "docs/inspect.md",
    "docs/rap.md",
    "docs/rivals.md",
    "docs/trust.md",
)
LAUNCHERS = ("docs/backbones.md", "docs/scale.md")  # test_example_launchers.py
ELSEWHERE = {  # pages whose blocks are run by a test of their own
    "docs/data.md": "calibration_data/test_docs.py",
    "docs/generation.md": "families/test_generation_docs.py",
    "docs/hub.md": "rotatek_compile/test_hub.py",
}


def test_no_page_is_left_out():
    assert sorted((*PLAYED, *LAUNCHERS)) == sorted(reading.pages())
    for page, test in ELSEWHERE.items():
        text = (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert Path(page).name in text and "```" in text, f"{test} does not read the blocks of {page}"


def test_readme(command, cli, here, server, make, parse_script, caches, monkeypatch, capsys):
    """The page from its first to its last example, one artifact through all of them."""
    from rotatek_compile.answer import model_inputs
    from rotatek_compile.calibration_data.bundled import BundledSet
    from rotatek_compile.runtime.cache import RotateKCache

    sample = BundledSet("mixed", "evaluation").sample(4)  # two pages, so small and in the model's ken
    for number, image in enumerate(sample.images, 1):
        image.save(f"page{number}.png")
    asked = [("What is the total?", sample.question)]

    def answer(example):
        said = command(example, asked)
        assert said["text"] == said["dense"]["text"] == sample.answers[0]
        assert said["kv_bytes"] < said["dense"]["kv_bytes"]

    def sampled(example):
        said = command(example)
        assert said["text"] == said["dense"]["text"] == said["document"]["answers"][0] == sample.answers[0]

    def video(example):
        """This model takes none, which it says; a folder of frames for one that does, as far as its packages are here."""
        Path("clip.mp4").mkdir()
        for number, image in enumerate(sample.images):
            image.resize((96, 80)).save(f"clip.mp4/{number}.png")
        refused = cli("run", *example.words[1:], "--device", "cpu").sentence()
        assert "takes no videos; pass frames as images instead" in refused
        Path("pages.jsonl").write_text('{"question": "What?", "answer": "word", "image": "clip.mp4/0.png"}\n' * 2, encoding="utf-8")
        compiled = ("--model", builders.build("qwen3-vl", here / "qwen3-vl"), "--calib", "pages.jsonl", "-o", "for-clips")
        assert cli("compile", *compiled, *SMALL["compile"]).code == 0
        if importlib.util.find_spec("torchvision"):
            command(example, [("artifact", "for-clips")])
        else:
            refused = cli("run", "for-clips", *example.words[2:], "--device", "cpu").sentence()
            assert "videos need torchvision, which is not installed here" in refused

    def suite(example):
        said = command(example, [("mixed", "mixed:line")], ("--batch-size", 1, "--max-new-tokens", 2))  # one page
        assert said["suite"] == "rivals" and len(said["rows"]) == 2 * len({(r["method"], r["setting"]) for r in said["rows"]})
        assert {row["method"] for row in said["rows"]} >= {"kivi2", "head-drop", "think", "paper"}
        resumed = command(example, [("mixed", "mixed:line")], ("--batch-size", 1, "--max-new-tokens", 2, "--resume"))
        assert resumed["rows"] == said["rows"]

    def card(example):
        command(example)
        assert "| artifact |" in Path("artifact/README.md").read_text(encoding="utf-8")

    def push(example):
        command(example)
        assert server.repos["lab/receipts"].private
        ask = reading.Example("README.md", example.line, "bash", f"rotatek-run lab/receipts --image page1.png --prompt {sample.question!r}")
        assert ask.text[: ask.text.index("page1")] in (ROOT / "README.md").read_text(encoding="utf-8")  # the comment of the line
        command(ask)

    def python(example):
        from rotatek_compile.api import load_base
        from rotatek_compile.artifact import read_artifact

        model, processor = load_base(read_artifact(Path("artifact")), device="cpu")
        model.generation_config.max_new_tokens = 3
        names = {"my_model": model, "inputs": model_inputs(processor, list(sample.images), sample.question), "images": list(sample.images)}
        caches.clear()
        exec(compile(example.text, str(example), "exec"), names)  # noqa: S102 - our own page
        names["model"].generate(**names["inputs"], max_new_tokens=3)
        model.generate(**names["inputs"])
        compiled, half, *asked, loaded, stock = caches
        assert all(isinstance(cache, RotateKCache) for cache in (compiled, half, *asked, loaded)) and not isinstance(stock, RotateKCache)
        assert Path("pages.rtk").stat().st_size > 0
        assert total(loaded) == total(compiled) < total(half)

    def demo(example):
        """What the target runs, one of the three questions."""
        lines = [line.split("bin/")[1] for line in make(example).splitlines() if "artifacts/demo" in line]
        assert len(lines) == 2
        command(reading.Example("Makefile", 0, "make", lines[0]))
        monkeypatch.syspath_prepend(ROOT / "tools")
        script = load("rotatek_demo", "tools/demo.py")
        monkeypatch.setattr(script, "DOCUMENTS", script.DOCUMENTS[:1])
        assert script.main(Path(lines[1].split()[-1])) == 0
        assert "compressed" in capsys.readouterr().out

    def rival(example):
        command(example, more=("--model", "tiny-llava-next", "--calib", "mixed", "-o", "dropped"))
        assert "head-drop" in cli("inspect", "dropped").out

    def install(example):
        """What the targets do."""
        assert example.text.removeprefix("pip install") in re.findall(r"\$\(PIP\)(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))

    special = {
        "make demo": demo,
        "pip install -e .": install,
        "rotatek-run artifact --data mixed --sample 4 --compare-dense": sampled,
        'rotatek-run artifact --image page1.png --image page2.png --prompt "What is the total?" --compare-dense': answer,
        'rotatek-run artifact --video clip.mp4 --prompt "What happens?"': video,
        "rotatek-eval artifact --data mixed --suite rivals --quick --output results": suite,
        "rotatek-eval artifact --data mixed --suite proof --output proof --plot": parse,
        "rotatek-eval artifact --data mixed --write-card": card,
        "rotatek-push artifact lab/receipts --private": push,
        "rotatek-compile --method head-drop --kv-budget 0.125 ...": rival,
        "rotatek-eval ARTIFACT --data mixed --suite rivals --num-samples 108 --output DIR": parse,  # how the table was measured
        "rotatek-compile --calib mixed --num-samples 72": parse,
        "torchrun --nproc-per-node N --no-python rotatek-compile ...": lambda example: None,  # test_example_launchers.py
    }
    play("README.md", {"rotatek": command, "make": make, "python": parse_script, "python block": python}, special)


def test_table_of_options(command, here, cli):
    """Every option of the README's table, with the value shown, at once; the values are the defaults."""
    rows = re.findall(r"^\| `(--[\w-]+) (\S+)`(.*?)\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 10
    others = {"--kv-budget", "--max-kl"}  # other budgets than the default one
    compiling = [word for option, value, where in rows if not where.strip() and option not in others for word in (option, value)]
    plan = ("compile", "--model", "tiny-llava-next", "--calib", "mixed", "-o", "out", "--dry-run")
    assert cli(*plan, *compiling).out == cli(*plan).out != ""
    for option, value, _ in (row for row in rows if row[0] in others):
        assert cli(*plan, option, value).out not in ("", cli(*plan).out)
    for option, value, where in rows:
        for name in re.findall("run|eval", where):
            parse(reading.Example("README.md", 0, "inline", f"rotatek-{name} {option} {value}"))


@pytest.mark.filterwarnings("ignore")
def test_codec(here, compiled, data_file, parse_script, capsys):
    """The block runs; compiling and evaluating at budgets is parsed here and run by the tests of the commands."""
    Path("artifact").symlink_to(compiled)
    Path("page1.png").symlink_to(data_file.parent / "page1.png")

    def python(example):
        exec(compile(example.text, str(example), "exec"), {})  # noqa: S102 - our own page

    play("docs/codec.md", {"rotatek": parse, "python block": python, "python": parse_script}, {})
    assert capsys.readouterr().out.split()[0] == "0"


def test_contributing(make):
    def suite(example):
        parse(reading.Example("CONTRIBUTING.md", 0, "inline", f"{example.text} artifact --data mixed --output out"))

    play("CONTRIBUTING.md", {"make": make}, {"python -m": lambda example: None, "rotatek-eval --suite rivals": suite})
    told = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\w+)$", told, re.MULTILINE) == ["lint", "test"]


def test_families(command, here):
    checkpoint = str(builders.build("llama", here / "checkpoint"))
    rows = [{"question": f"What comes after {n}, {n + 1}, and so on? " * (3 + n), "answer": f"word {n}"} for n in range(3)]
    Path("documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    long = "What comes after one, two, three, and so on? " * 6

    def run(example):
        command(example, [("...", long)])

    def compiling(example):
        command(example, [("llama", checkpoint)])

    special = {
        "rotatek-compile --model llama --calib documents.jsonl --span all -o artifact": compiling,
        'rotatek-run artifact --prompt "..."': run,
    }
    play("docs/families.md", {"rotatek": command}, special)


@pytest.mark.filterwarnings("ignore")
def test_ask_many(here, compiled, data_file, parse_script):
    """The blocks one after another; answers of a random model are any text."""
    Path("artifact").symlink_to(compiled)
    Path("page1.png").symlink_to(data_file.parent / "page1.png")
    names = {}

    def python(example):
        exec(compile(example.text, str(example), "exec"), names)  # noqa: S102 - our own page

    special = {"python benchmarks/bench_ask_many.py ARTIFACT": parse_script}
    play("docs/ask_many.md", {"python block": python}, special)
    assert Path("page1.rtk").is_file() and names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["turn"].past_key_values.tokens()[0] > names["batch"].cache.tokens()[0] > 0


def test_inspect(command, here, compiled, make_checkpoint, cli, data_file):
    other = ("--model", make_checkpoint(seed=3), "--calib", data_file, "--keep-ratio", 0.5, "-o", "other")
    assert cli("compile", *other, *SMALL["compile"]).code == 0
    Path("artifact").symlink_to(compiled)
    play("docs/inspect.md", {"rotatek": command}, {"rotatek-compile --method head-drop": parse})  # run with its budget: README
    assert len(Path("both.html").read_text(encoding="utf-8")) > len(Path("artifact.html").read_text(encoding="utf-8"))


def test_trust(make, monkeypatch):
    def one_case(example):
        ended = subprocess.run([sys.executable, *example.words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0 and '"done"' in ended.stdout, ended.stderr

    play("docs/trust.md", {"make": make}, {"python tools/fuzz_artifact.py --only 4711": one_case})
    assert "--cases 20000" in make(reading.Example("", 0, "", "make fuzz")) and "--kills 50" in make(
        reading.Example("", 0, "", "make kill")
    )


def elsewhere(example):
    """Run by the page's own test (ELSEWHERE), which reads all blocks of this kind."""
    assert example.kind in ("bash", "python")


def test_data(command, here, tmp_path):
    """What stands between the blocks, which test_docs.py runs."""
    blocks = [example.text for example in reading.examples("docs/data.md") if example.kind == "bash"]

    def download(example):
        """The Hub's own command, in a cache that has the repository."""
        cached, commit = tmp_path / "hub" / f"datasets--{example.words[-1].replace('/', '--')}", "c" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}"}
        ended = subprocess.run(example.text, shell=True, env=settings, capture_output=True, text=True)
        assert ended.returncode == 0 and commit in ended.stdout, ended.stderr

    def offline(example):
        assert example.text.removeprefix("HF_HUB_OFFLINE=1 ") in blocks  # test_docs.py sets it too

    def row(example):
        assert json.loads(example.text).keys() == {"file_name", "question", "answers"}  # read by test_docs.py

    def table(example):
        """A CSV file of two lines, as the page has it."""
        from PIL import Image

        from rotatek_compile.calibration_data.registry import open_data

        lines = [found.text for found in reading.examples("docs/data.md") if found.line in (example.line, example.line + 1)]
        Path("rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for number in (1, 2):
            Image.new("RGB", (9, number)).save(f"page{number}.png")
        sample = open_data("rows.csv", "evaluation", 0).sample(0)
        assert (sample.question, sample.answers) == ("What is the total?", ("12.50", "12.5"))
        assert [image.size for image in sample.images] == [(9, 1), (9, 2)]

    special = {
        "question,answers,images": table,
        'What is the total?,"[""12.50"", ""12.5""]","[""page1.png"", ""page2.png""]"': lambda example: None,  # the same table
        "hf download --repo-type dataset HuggingFaceM4/DocumentVQA": download,
        "HF_HUB_OFFLINE=1 rotatek-compile --model llava-next --calib docvqa -o artifact": offline,
        '{"file_name": "page1.png", "question": "What is the total?", "answers": ["12.50", "12.5"]}': row,
        "rotatek-compile --list-data": command,
        "hf auth login": lambda example: None,  # asks for a token; the name is huggingface_hub's
    }
    play("docs/data.md", {"rotatek": elsewhere}, special)


def test_generation(parse_script):
    def adapter(example):
        parse(reading.Example("docs/generation.md", 0, "inline", f"{example.text} folder"))

    scripts = ("print_matrix.py --write docs/generation.md", "bench_steps.py", "bench_answers.py")
    special = {f"python benchmarks/{script}": parse_script for script in scripts} | {"rotatek-run --adapter": adapter}
    play("docs/generation.md", {"rotatek": elsewhere, "python block": elsewhere}, special)


@pytest.mark.parametrize(("page", "script"), [("docs/decode.md", "bench_decode"), ("docs/evidence.md", "bench_rotation")])
def test_what_was_measured(page, script, parse_script):
    (example,) = (one.text for one in reading.examples(page) if one.text.startswith(f"python benchmarks/{script}.py"))
    play(page, {}, {example: parse_script})


def test_hub():
    """What stands between the blocks, which test_hub.py runs; the calls of lmms-eval are in test_lmms_eval.py."""
    tree = ast.parse((ROOT / "rotatek_compile" / "lmms_eval_model.py").read_text(encoding="utf-8"))
    made = [node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    taken = {argument.arg for arguments in made for argument in arguments.args}

    def lmms_eval(example):
        given = dict(pair.split("=") for pair in example.words[example.words.index("--model_args") + 1].split(","))
        assert example.words[3:5] == ["--model", "rotatek"] and "artifact" in given and given.keys() <= taken

    special = {
        "pip install 'rotatek-compile[plot]'": lambda example: None,  # test_named_extras
        "rotatek-compile --with-weights": parse,  # test_hub.py: test_compile_with_weights
        "hf auth login": lambda example: None,
    }
    play("docs/hub.md", {"rotatek": elsewhere, "eval": elsewhere, "python": lmms_eval, "python block": elsewhere}, special)


def test_rivals(command, compiled, parse_script):
    """Training is parsed alone (tests/benchmarks do it): scales drawn at random, and channels as directions, stand for its files."""
    import torch

    from rotatek_compile.artifact import read_artifact
    from rotatek_compile.learned import save_learned
    from rotatek_compile.runtime.rivals import leank_learned, palu

    Path("artifact").symlink_to(compiled)

    def train(example):
        asked, artifact = parse_script(example), read_artifact("artifact")
        if "learn_leank" in example.text:
            name, training = "leank-learned", {"ratios": asked.ratios}
            tensors = {key: torch.rand(shape) for key, shape in leank_learned.shapes_of(artifact.geometry, training).items()}
        else:
            name, training, shapes = "palu", {}, palu.shapes_of(artifact.geometry, {})
            tensors = {key: torch.eye(*shape) if len(shape) == 2 else torch.ones(shape) for key, shape in shapes.items()}
        calibration = {"data": asked.calib, "num_samples": asked.num_samples, "seed": asked.seed}
        facts = {"base_model": artifact.base_model, "geometry": artifact.geometry.to_json(), "calibration": calibration}
        save_learned(asked.output, name, tensors, facts | {"training": training})

    play("docs/rivals.md", {"rotatek": command, "python": train}, {})


@pytest.mark.filterwarnings("ignore")
def test_rap(command, here, cli, data_file, make_checkpoint):
    """A random model stands for the bundled one; its answers may be blank."""
    stand_in = {"tiny-llava-next": str(make_checkpoint(name="rap")), "mixed": str(data_file)}
    Path("page1.png").symlink_to(data_file.parent / "page1.png")

    def compiling(example):
        words = [stand_in.get(word, word) for word in example.words[1:]]
        counts = json.loads(cli("compile", *words, *SMALL["compile"]).out)["counts"]
        assert {"config.json", "model.safetensors", "rap.safetensors"} <= {file.name for file in Path("smaller").iterdir()}
        assert counts["pruned"]["attention_flops"] < counts["dense"]["attention_flops"]

    def run(example):
        said = json.loads(cli("run", *example.words[1:], *SMALL["run"]).out)
        assert 0 < said["kv_bytes"] < said["kv_bytes_dense"] == said["dense"]["kv_bytes"]

    def python(example):
        names = {}
        exec(compile(example.text, str(example), "exec"), names)  # noqa: S102 - our own page
        assert type(names["model"].model.language_model.layers[0].self_attn).__name__ == "PairPrunedLlamaAttention"

    def stacking(example):
        words = [stand_in.get(word, word) for word in example.words[1:]]
        said = json.loads(cli("compile", *words, *SMALL["compile"]).out)
        assert said["method"] == "rap+rotatek" and said["plan"]["share"] <= 0.0625

    def three_rows(example):
        words = [stand_in.get(word, word) for word in example.words[1:]]
        said = json.loads(cli("eval", *words, *SMALL["eval"]).out)
        assert [row["method"] for row in said["rows"]] == ["dense", "rap", "artifact", "rotatek"]

    both = "--method rap+rotatek --keep-ratio 0.8 --kv-budget 0.0625"
    special = {
        "rotatek-compile --model tiny-llava-next --calib mixed --method rap --keep-ratio 0.7 -o smaller": compiling,
        f"rotatek-compile --model tiny-llava-next --calib mixed {both} -o stacked": stacking,
        'rotatek-run stacked --image page1.png --prompt "What is the total?" --compare-dense': run,
        "rotatek-eval stacked --data mixed --method rotatek --kv-budget 0.125": three_rows,
        'rotatek-run smaller --image page1.png --prompt "What is the total?" --compare-dense': run,
        "rotatek-eval smaller --data mixed": lambda example: command(example, stand_in.items()),
    }
    play("docs/rap.md", {"rotatek": command, "python block": python}, special)
