"""Nearly blank pages: one page with two `key: value` lines, asked for the value of one of them.

Of some hundred image tokens about ten show the line that is asked for, and nearly all of the others show blank paper: data where single
tokens matter. Pages and style are those of the bundled `forms`, which have 6 to 16 lines on one to three pages.
"""

from __future__ import annotations

from PIL import Image

from rotatek_compile.calibration_data import fields
from rotatek_compile.calibration_data.drawing import draw_page
from rotatek_compile.calibration_data.draws import Draws
from rotatek_compile.calibration_data.page import blank_content
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.calibration_data.source import DataSource

NAME = "sparse"
FULLNESS = 1  # percent of the usual number of lines; a page has at least two


def source(split: str, seed: int = 0) -> DataSource:
    """The data set; documents are made when they are asked for, each from its own stream."""

    def sample(number: int) -> Sample:
        name = f"{NAME}/{split}/{seed}/{number}"
        draws = Draws(name)
        content = blank_content(draws, FULLNESS)
        fields.write_page(draws, content)
        question = fields.ask_field(draws, content)
        if question is None:  # a page of fields always has some
            raise ValueError(f"{name} has no field")
        images = tuple(Image.fromarray(draw_page(draws, page)) for page in content.pages)
        return Sample(id=name, images=images, question=question.text, answers=(question.answer,), skill=question.skill)

    return DataSource(NAME, split, None, None, sample)
