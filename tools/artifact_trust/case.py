"""One case: the files of an artifact, or what stands in their places."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, TENSORS, REPORT = "rotatek_config.json", "rotatek.safetensors", "report.json"
CARRIED = ("processor_config.json", "tokenizer_config.json")


@dataclass(slots=True)
class Case:
    """Files by name: bytes, or ("link", target), ("directory",), ("pipe",), ("sparse", size); and what was done, in words."""

    files: dict[str, Any]
    done: list[str] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        for name, content in self.files.items():
            file = directory / name
            match content:
                case bytes():
                    file.write_bytes(content)
                case ("link", target):
                    file.symlink_to(target)
                case ("directory",):
                    file.mkdir()
                case ("pipe",):
                    os.mkfifo(file)
                case ("sparse", size):
                    file.touch()
                    os.truncate(file, size)
