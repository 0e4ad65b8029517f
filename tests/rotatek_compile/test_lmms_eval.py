"""The lmms-eval model, against a stand-in that has the names, signatures and calls of lmms-eval 0.7's plugin API.

lmms-eval itself is on no package index. What the stand-in says was read in its sources: lmms_eval/models/registry_v2.py (manifests),
lmms_eval/api/model.py (base class), lmms_eval/api/instance.py (requests and results), lmms_eval/protocol.py (messages).
"""

import abc
import configparser
import importlib
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int = 0
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


class CacheHook:
    def __init__(self):
        self.seen = []

    def add_partial(self, attr, req, res):
        self.seen.append((attr, req, res))


class lmms(abc.ABC):  # noqa: N801 - its name there
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}
        # names its cache of responses by what the instance is called at this moment
        self.cache_name = next(
            (getattr(self, n) for n in ("model_name", "model_id", "pretrained") if isinstance(getattr(self, n, None), str)), None
        )

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        values = {"True": True, "False": False}
        arguments = {k: values.get(v, v) for k, v in (part.split("=", 1) for part in arg_string.split(","))}
        return cls(**arguments, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


class ChatMessages:
    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        parts = [part for message in self.messages for part in message["content"]]
        return tuple([part["url"] for part in parts if part["type"] == kind] for kind in ("image", "video", "audio"))

    def to_hf_messages(self, video_kwargs=None):
        def part(content):
            return content if content["type"] == "text" else {"type": content["type"], content["type"]: content["url"]}

        return [{"role": m["role"], "content": [part(content) for content in m["content"]]} for m in self.messages]


@pytest.fixture
def model_class(monkeypatch):
    """Our class, found as lmms-eval's registry finds it: entry point, manifest, class path, checks."""
    modules = {
        "lmms_eval": {},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "rotatek_compile.lmms_eval_model", raising=False)
    module, function = entry_point().split(":")
    manifest = getattr(importlib.import_module(module), function)()
    assert isinstance(manifest, ModelManifest) and manifest.model_id == "rotatek" and manifest.simple_class_path is None
    module, name = manifest.chat_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, lmms) and not found.is_simple and not found.__abstractmethods__
    yield found
    sys.modules.pop("rotatek_compile.lmms_eval_model", None)


def entry_point():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    [line] = config["options.entry_points"]["lmms_eval.models"].split("\n")[1:]
    name, value = line.split(" = ")
    assert name == "rotatek"
    return value


DOCUMENTS = [
    {"question": "What is it?", "pages": 1},
    {"question": "And what else can be read on both pages?", "pages": 2},
    {"question": "No page?", "pages": 0},
]


@pytest.fixture
def requests(data_file):
    from PIL import Image

    def messages(doc):
        pages = [{"type": "image", "url": Image.open(data_file.parent / f"page{n}.png").convert("RGB")} for n in range(doc["pages"])]
        return [{"role": "user", "content": [*pages, {"type": "text", "text": doc["question"]}]}]

    def make(*documents, **options):
        return [
            Instance("generate_until", (f"context {n}", messages, {"max_new_tokens": 4} | options, n, "task", "test")) for n in documents
        ]

    return make


def create(model_class, compiled, words="", **more):
    model = model_class.create_from_arg_string(
        f"artifact={compiled}{words}", {"batch_size": 1, "max_batch_size": None, "device": "cpu"} | more
    )
    model.task_dict = {"task": {"test": DOCUMENTS}}
    return model


def texts(results):
    assert all(isinstance(r, GenerationResult) and 0 <= r.token_counts.output_tokens <= 4 for r in results)
    return [r.text for r in results]


def test_answers_are_those_of_generate(model_class, compiled, requests, data_file):
    import torch
    from PIL import Image

    model = create(model_class, compiled)
    answers = texts(model.generate_until(requests(0, 1, 2)))
    page = Image.open(data_file.parent / "page0.png").convert("RGB")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DOCUMENTS[0]["question"]}]}]
    text = model.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = model.processor(text=[text], images=[page], return_tensors="pt")
    with torch.no_grad():
        ids = model.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers[0] == model.tokenizer.decode(ids, skip_special_tokens=True).strip() != ""
    assert [request for _, request, _ in model.cache_hook.seen] == [(f"context {n}", {"max_new_tokens": 4}) for n in range(3)]


def test_batches_orders_and_groups(model_class, compiled, requests):
    single = create(model_class, compiled)
    batched = create(model_class, compiled, batch_size="2")
    asked = [*requests(1, 0), *requests(2, max_new_tokens=2), *requests(0, 1)]
    alone, together = (texts(model.generate_until(asked)) for model in (single, batched))
    assert alone == together and alone[0] == alone[4] and alone[1] == alone[3]
    assert list(batched._batches(asked)) == [[0, 1], [3, 4], [2]]


def test_what_the_processor_is_given(model_class, compiled, requests, monkeypatch):
    """Images by prompt (Gemma 3 and SmolVLM take no flat list for several), and no second begin-of-sequence token (Gemma 3 adds one)."""
    model, given = create(model_class, compiled, batch_size="3"), []
    call = type(model.processor).__call__
    monkeypatch.setattr(type(model.processor), "__call__", lambda self, **named: given.append(named) or call(self, **named))
    texts(model.generate_until(requests(0, 1, 2)))
    assert [len(pages) for pages in given[0]["images"]] == [1, 2, 0] and "add_special_tokens" not in given[0]
    start = given[0]["text"][0].split(">")[0] + ">"
    model.tokenizer.bos_token = start
    texts(model.generate_until(requests(2)))
    assert given[1]["add_special_tokens"] is False and "images" not in given[1]


def test_dense_and_compressed_differ_in_the_cache_only(model_class, compiled, requests):
    from rotatek_compile.runtime.enable import active

    ours, dense = create(model_class, compiled), create(model_class, compiled, ",dense=True")
    assert active(ours.model) is not None and active(dense.model) is None
    assert ours.cache_name != dense.cache_name and str(compiled) in ours.cache_name
    assert len(texts(dense.generate_until(requests(0, 1)))) == 2


def test_generation_arguments(model_class, compiled, requests):
    model = create(model_class, compiled)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": model.tokenizer.pad_token_id}
    assert model._arguments({"temperature": 0, "top_p": 0.5, "until": ["\n"]}) == greedy | {"max_new_tokens": 1024}
    assert model._arguments({"do_sample": False, "temperature": 0.7, "num_beams": 3}) == greedy | {"num_beams": 3, "max_new_tokens": 1024}
    sampled = model._arguments({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8})
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"], sampled["max_new_tokens"]) == (True, 0.7, 0.9, 8)


def test_stop_strings(model_class, compiled, requests):
    model = create(model_class, compiled)
    [whole] = texts(model.generate_until(requests(0)))
    stop = whole[len(whole) // 2]
    assert texts(model.generate_until(requests(0, until=["never", stop, ""]))) == [whole[: whole.index(stop)].rstrip()]
    assert texts(model.generate_until(requests(0, until=stop))) == [whole[: whole.index(stop)].rstrip()]


def test_system_prompt(model_class, compiled, requests):
    model = create(model_class, compiled, ",system_prompt=Be brief.")
    context, messages, options, *place = requests(0)[0].args
    told = model._messages(context, messages, options, *place).to_hf_messages()
    assert told[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]} and told[1]["role"] == "user"


def test_what_evaluators_read(model_class, compiled):
    model = create(model_class, compiled)
    assert (model.rank, model.world_size, model.batch_size, str(model.device)) == (0, 1, 1, "cpu")
    assert int(model.accelerator.gather(__import__("torch").tensor(3))) == 3


def test_refusals(model_class, compiled, requests):
    from rotatek_compile.errors import RotateKError, UsageError

    for words, sentence in (
        (",attn_implementation=sdpa", "unknown model argument attn_implementation"),
        (",batch_size=auto", "batch_size auto is not supported"),
    ):
        with pytest.raises(UsageError, match=sentence):
            model_class.create_from_arg_string(f"artifact={compiled}{words}", {"device": "cpu"})
    with pytest.raises(UsageError, match="needs an artifact: --model_args artifact="):
        model_class.create_from_arg_string("dtype=float32")
    with pytest.raises(RotateKError, match="/no/artifact does not exist"):
        model_class.create_from_arg_string("pretrained=/no/artifact")
    model = create(model_class, compiled)
    sound = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    with pytest.raises(UsageError, match="the task has sounds"):
        model.generate_until([Instance("generate_until", ("c", lambda doc: sound, {}, 0, "task", "test"))])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose the"):
            method([])


def test_entry_point_imports_nothing_heavy(monkeypatch):
    """lmms-eval loads every plugin's entry point at start."""
    import subprocess

    code = "import rotatek_compile.lmms_eval, sys; print({'torch', 'transformers', 'lmms_eval'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr
