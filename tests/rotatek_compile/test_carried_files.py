"""An artifact never has code run, another repository loaded or a file elsewhere opened, whatever its files for transformers say."""

import io
import json
import shutil

import pytest

from rotatek_compile import ArtifactError, RotateKError
from rotatek_compile.api import load, load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.carried_files import check_carried_files

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlavaNextProcessor
class Evil(LlavaNextProcessor):
    pass
"""


def edit(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "processor_config.json",
            {"audio_tokenizer": {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/repo"}},
            "processor_config.json: 'audio_tokenizer' is {'audio_tokenizer_class': 'DacModel', "
            "'audio_tokenizer_name_or_path': 'evil/repo'}, which loads another model",
        ),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "'tokenizer_file' is '/etc/passwd', which opens a file by name"),
        ("tokenizer_config.json", {"a": [{"vocab_file": "../x"}]}, "'vocab_file' is '../x', which opens a file by name"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "../x.json"]}, "which opens a file by name"),
        ("config.json", {"use_pretrained_backbone": True}, "'use_pretrained_backbone' is True, which loads another model"),
        ("config.json", {"text_config": {"attn_implementation": "evil/kernel"}}, "'evil/kernel', which loads a kernel from the Hub"),
        ("adapter_config.json", {"base_model_name_or_path": "evil/repo"}, "names another model to load, which an artifact may not"),
    ],
)
def test_files_that_lead_elsewhere(broken_artifact, name, changes, words):
    edit(broken_artifact, name, **changes)
    with pytest.raises(ArtifactError) as error:
        check_carried_files(broken_artifact)
    assert words in str(error.value) and str(error.value).endswith("; delete it, or get the artifact again")


def test_files_that_stay_inside(broken_artifact, compiled):
    check_carried_files(compiled)
    edit(broken_artifact, "tokenizer_config.json", tokenizer_file=None, fast_tokenizer_files=["tokenizer.json"], name_or_path="org/name")
    edit(broken_artifact, "config.json", use_pretrained_backbone=False, attn_implementation="sdpa")
    check_carried_files(broken_artifact)


def test_link_out_of_the_artifact(broken_artifact, tmp_path):
    shutil.move(broken_artifact / "tokenizer.json", tmp_path / "tokenizer.json")
    (broken_artifact / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(ArtifactError, match="tokenizer.json is a link to .*, outside the artifact"):
        load(broken_artifact)


def test_loading_is_refused_before_transformers_reads(broken_artifact):
    edit(broken_artifact, "processor_config.json", audio_tokenizer={"audio_tokenizer_name_or_path": "evil/repo"})
    with pytest.raises(ArtifactError, match="which loads another model"):
        load(broken_artifact)


@pytest.mark.parametrize("where", ["evil--", ""])
def test_code_in_an_artifact_never_runs(broken_artifact, tmp_path, monkeypatch, where):
    """Not even where a person at the terminal would say yes: nobody is asked."""
    marker = tmp_path / "ran"
    (broken_artifact / "evil.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    for name, auto in (("processor_config.json", "AutoProcessor"), ("tokenizer_config.json", "AutoTokenizer")):
        reference = f"{where}evil.Evil"
        edit(
            broken_artifact, name, auto_map={auto: reference if auto == "AutoProcessor" else [reference, reference]}, trust_remote_code=True
        )
    load_base(read_artifact(broken_artifact))  # transformers has classes of its own for both
    edit(broken_artifact, "processor_config.json", processor_class="Evil")
    edit(broken_artifact, "tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(RotateKError, match="could not load the processor"):
        load_base(read_artifact(broken_artifact))
    assert not marker.exists() and "evil" not in str(__import__("sys").modules.keys())


def test_code_of_a_local_checkpoint_never_runs_unasked(broken_checkpoint, tmp_path, monkeypatch):
    """A base that the artifact names by its path is loaded without its code, and without a question."""
    from rotatek_compile.models import load_config, resolve

    marker = tmp_path / "ran"
    (broken_checkpoint / "evil.py").write_text(CODE.format(marker=str(marker)))
    edit(broken_checkpoint, "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(RotateKError, match="could not read the config"):
        load_config(resolve(str(broken_checkpoint)))
    assert not marker.exists()
