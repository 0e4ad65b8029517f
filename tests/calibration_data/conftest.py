"""Data sets as they lie on the Hub, in miniature: parquet files with the schema of each card, in a Hub cache of the test's own.

Commands then read them by their real names, through the code that reads the real ones offline.
"""

import io

import pytest
from PIL import Image

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def png(number=0, size=(48, 32), mode="RGB"):
    """A small picture of its own, as stored."""
    stream = io.BytesIO()
    Image.linear_gradient("L").rotate(37 * number).resize(size).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def schema(**columns):
    """`datasets.Features`; "s" string, "i4" and so on integers, "f" float32, "image", and lists of one of them."""
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as Picture

    kinds = {"s": "string", "i1": "int8", "i4": "int32", "i8": "int64", "f": "float32", "d": "float64"}

    def feature(kind):
        if isinstance(kind, list):
            return List(feature(kind[0]))
        if isinstance(kind, dict):
            return {name: feature(value) for name, value in kind.items()}
        if isinstance(kind, tuple):
            return ClassLabel(names=list(kind))
        return Picture() if kind == "image" else Value(kinds[kind])

    return Features({name: feature(kind) for name, kind in columns.items()})


# Columns of the cards, in their order.
DOCVQA = {
    "questionId": "s", "question": "s", "question_types": ["s"], "image": "image", "docId": "i8", "ucsf_document_id": "s",
    "ucsf_document_page_no": "s", "answers": ["s"], "data_split": "s",
}  # fmt: skip
INFOVQA = {
    "questionId": "s", "question": "s", "answers": ["s"], "answer_type": ["s"], "image": "image", "image_url": "s",
    "operation/reasoning": ["s"], "ocr": "s", "data_split": "s",
}  # fmt: skip
DOCVQA_TRAIN = {name: kind for name, kind in DOCVQA.items() if name != "data_split"} | {"questionId": "i4", "docId": "i4"}
CAULDRON = {"images": ["image"], "texts": [{"user": "s", "assistant": "s", "source": "s"}]}
CHARTQA = {"type": "s", "question": "s", "answer": "s", "image": "image"}
CHARTQA_TRAIN = {"image": "image", "query": "s", "label": ["s"], "human_or_machine": ("human", "machine")}
TEXTVQA = {
    "image_id": "s", "question_id": "i4", "question": "s", "question_tokens": ["s"], "image": "image", "image_width": "i4",
    "image_height": "i4", "flickr_original_url": "s", "flickr_300k_url": "s", "answers": ["s"], "image_classes": ["s"], "set_name": "s",
    "ocr_tokens": ["s"],
}  # fmt: skip
OCRBENCH = {"dataset": "s", "question": "s", "question_type": "s", "answer": ["s"], "image": "image"}
SCIENCEQA = {
    "image": "image", "question": "s", "choices": ["s"], "answer": "i1", "hint": "s", "task": "s", "grade": "s", "subject": "s",
    "topic": "s", "category": "s", "skill": "s", "lecture": "s", "solution": "s",
}  # fmt: skip
MATHVISTA = {
    "pid": "s", "question": "s", "image": "s", "decoded_image": "image", "choices": ["s"], "unit": "s", "precision": "d", "answer": "s",
    "question_type": "s", "answer_type": "s",
    "metadata": {"category": "s", "context": "s", "grade": "s", "img_height": "i8", "img_width": "i8", "language": "s", "skills": ["s"],
                 "source": "s", "split": "s", "task": "s"},
    "query": "s",
}  # fmt: skip
REFCOCO = {
    "question_id": "s", "image": "image", "question": "s", "answer": ["s"], "segmentation": ["f"], "bbox": ["f"], "iscrowd": "i1",
    "file_name": "s",
}  # fmt: skip


def math(answer, question_type="free_form", answer_type="integer", **more):
    """One MathVista row."""
    return {
        "question": "How much?", "answer": answer, "question_type": question_type, "answer_type": answer_type, "choices": None,
        "unit": None, "precision": None, "metadata": {"task": "figure question answering"},
    } | more  # fmt: skip


# Repository: configuration (None: the default one): split: (columns, rows).
REPOSITORIES = {
    "lmms-lab-encoder/DocVQA": {
        "DocVQA": {
            "validation": (DOCVQA, [{"questionId": f"{n}", "question": f"What is {n}?", "answers": [f"v{n}", "other"]} for n in range(6)]),
            "test": (DOCVQA, [{"questionId": "9", "question": "What?", "answers": None}]),
        },
        "InfographicVQA": {
            "validation": (INFOVQA, [{"questionId": "70", "question": "Which share?", "answers": ["12 %"]}]),
            "test": (INFOVQA, [{"questionId": "71", "question": "Which?", "answers": None}]),
        },
    },
    "HuggingFaceM4/DocumentVQA": {
        None: {
            split: (DOCVQA_TRAIN, [{"questionId": start + n, "question": f"Who is {n}?", "answers": [f"t{n}"]} for n in range(8)])
            for split, start in (("train", 100), ("validation", 200), ("test", 300))
        }
    },
    "HuggingFaceM4/the_cauldron": {
        "infographic_vqa": {
            "train": (CAULDRON, [{"images": [png(n)], "texts": [{"user": f"What is {n}?\nBe brief.", "assistant": f"c{n}."},
                                                               {"user": "And?", "assistant": "more."}]} for n in range(2)]),
        },
        "ai2d": {"train": (CAULDRON, [{"images": [png()], "texts": [{"user": "Hm?", "assistant": "Yes."}]}])},
    },
    "lmms-lab-encoder/ChartQA": {
        None: {"test": (CHARTQA, [{"type": "human_test", "question": "How high?", "answer": "40"},
                                  {"type": "augmented_test", "question": "How low?", "answer": "0.5"}])},
    },
    "HuggingFaceM4/ChartQA": {
        None: {"train": (CHARTQA_TRAIN, [{"query": "How many?", "label": ["3"], "human_or_machine": kind} for kind in (0, 1)]),
               "val": (CHARTQA_TRAIN, [{"query": "How few?", "label": ["2"], "human_or_machine": 0}])},
    },
    "lmms-lab/textvqa": {
        None: {
            split: (TEXTVQA, [{"question_id": n, "question": "what does The sign say?", "answers": ["go", *["stop"] * 6, *["halt"] * 3]}])
            for split, n in (("train", 1), ("validation", 2))
        },
    },
    "echo840/OCRBench": {
        None: {"test": (OCRBENCH, [{"dataset": "IIIT5K", "question": " what is written? ", "question_type": "Regular Text Recognition",
                                    "answer": ["Hello"]},
                                   {"dataset": "HME100k", "question": "formula?", "answer": ["x + 1"],
                                    "question_type": "Handwritten Mathematical Expression Recognition"}])},
    },
    "derek-thomas/ScienceQA": {
        None: {"train": (SCIENCEQA, [{"image": None if n % 2 else png(n), "question": f"Which is {n}?", "choices": ["yes", "no"],
                                      "answer": 1, "hint": "", "subject": "natural science"} for n in range(4)])},
    },
    "lmms-lab-encoder/ScienceQA": {
        "ScienceQA-IMG": {"test": (SCIENCEQA, [{"question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "hint": "Look.",
                                                "subject": "language science"}])},
        "ScienceQA-FULL": {"test": (SCIENCEQA, [{"image": None, "question": "?", "choices": ["a"], "answer": 0}])},
    },
    "AI4Math/MathVista": {
        None: {
            "testmini": (MATHVISTA, [
                {"pid": "1"} | math("12"),
                {"pid": "2"} | math("1.5", answer_type="float", precision=1.0, unit="cm"),
                {"pid": "3"} | math("green", "multi_choice", "text", choices=["red", "green"]),
                {"pid": "4"} | math("[1, 2]", answer_type="list"),
            ]),
            "test": (MATHVISTA, [{"pid": "5"} | math("")]),
        },
    },
    "lmms-lab-encoder/RefCOCO": {
        None: {split: (REFCOCO, [{"question_id": split, "question": "?", "answer": ["left dog", "the dog"],
                                 "bbox": [12.0, 8.0, 24.0, 16.0]}])
               for split in ("val", "testA")},
    },
    "someone/invoices": {
        None: {"train": ({"id": "s", "image": "image", "question": "s", "answer": "s"},
                         [{"id": f"a{n}", "question": "Total?", "answer": f"{n}"} for n in range(3)])},
    },
}  # fmt: skip


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache; call it with a repository's id to put that in, with `changed` configurations in place of those above."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(repository, changed=None, commit=COMMIT, under=None):
        folder = cache / f"datasets--{(under or repository).replace('/', '--')}"
        write_repository(folder / "snapshots" / commit, changed or REPOSITORIES[repository])
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    return add


def write_repository(folder, configs):
    """Parquet files and the card that says which file is which split, laid out as on the Hub."""
    import datasets

    datasets.disable_progress_bars()
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        place = config or "data"
        (folder / place).mkdir(parents=True, exist_ok=True)
        lines += [f"- config_name: {config or 'default'}", "  data_files:"]
        for split, (columns, rows) in splits.items():
            features = schema(**columns)
            full = [
                dict.fromkeys(columns) | ({"image": png(n)} if columns.get("image") == "image" else {}) |
                ({"decoded_image": png(n)} if "decoded_image" in columns else {}) | row
                for n, row in enumerate(rows)
            ]  # fmt: skip
            data = {name: [row[name] for row in full] for name in columns}
            datasets.Dataset.from_dict(data, features=features).to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {place}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture
def hub_commit():
    """The commit at which `hub_cache` puts repositories unless told otherwise."""
    return COMMIT


@pytest.fixture
def make_png():
    """Stored pictures: `make_png(number)`."""
    return png
