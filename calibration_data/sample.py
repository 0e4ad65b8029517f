"""One document with its question: what every data set of this package yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`images` are the pages in reading order; any of `answers` counts as right; `skill` sorts questions, where a set has several.

    `metric` names the set's own score (rotatek_compile/scores.py); `details` is what it needs beside the answers.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    skill: str = ""
    metric: str = "exact_match"
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
