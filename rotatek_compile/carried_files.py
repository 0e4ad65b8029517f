"""Files that an artifact carries for transformers: processor, tokenizer, chat template, and weights where it has them.

transformers reads them, so what they may say is transformers' format. But some of its keys load *another* repository or open a file by
name, and an artifact must do neither: such files are refused here, before transformers sees them. Its own code (`auto_map`) needs no
refusal: whoever loads from an artifact passes `trust_remote_code=False`, which is more than leaving it out (then transformers asks).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .untrusted import inside, parse_json, read_file, shown

MAX_CARRIED = 16 << 20  # bytes of a JSON file; a tokenizer_config.json with thousands of added tokens has one or two million
SMALL_JSON = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)
ADAPTER = "adapter_config.json"  # with peft installed, transformers loads the base model that it names
DO_INSTEAD = "delete it, or get the artifact again"


def check_carried_files(directory: Path) -> None:
    """Refuse an artifact directory whose files would have transformers look elsewhere.

    Raises:
        ArtifactError: one sentence naming the file, the key, the value seen and what to do.
    """
    try:
        entries = [*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")]
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be read ({error.strerror or error}); check its path and permissions") from error
    for entry in entries:
        if entry.is_symlink() and not inside(directory, entry):
            raise ArtifactError(f"{entry} is a link to {shown(os.path.realpath(entry))}, outside the artifact; put the file itself there")
    if (directory / ADAPTER).exists():
        raise ArtifactError(f"{directory / ADAPTER} names another model to load, which an artifact may not; {DO_INSTEAD}")
    for name in SMALL_JSON:
        if (directory / name).exists():
            found = parse_json(read_file(directory, name, MAX_CARRIED), str(directory / name), printable=False)
            for key, value in _pairs(found):
                if reason := _elsewhere(key, value):
                    raise ArtifactError(f"{directory / name}: {shown(key)} is {shown(value)}, which {reason}; {DO_INSTEAD}")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner)


def _elsewhere(key: str, value: Any) -> str | None:
    """What loading this would reach for, in words, or None."""
    if value is None or value is False:
        return None
    if key == "audio_tokenizer" or key.startswith("audio_tokenizer_"):
        return "loads another model"
    if key == "use_pretrained_backbone":
        return "loads another model"
    if key in ("attn_implementation", "_attn_implementation", "experts_implementation") and "/" in str(value):
        return "loads a kernel from the Hub"
    if key.endswith("_file"):
        return "opens a file by name"
    if key == "fast_tokenizer_files" and any(Path(str(name)).name != name for name in (value if isinstance(value, list) else [value])):
        return "opens a file by name"
    return None
