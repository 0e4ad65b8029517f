"""One document with its question: what every data set of this package yields."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`images` are the pages in reading order; any of `answers` counts as right; `skill` sorts questions, where a set has several."""

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    skill: str = ""
