"""Every answer, derived anew by a reader that knows nothing but the character cells of the pages and the question."""

import re
from collections import Counter

import numpy as np
import pytest

from rotatek_compile.calibration_data import bundled
from rotatek_compile.calibration_data.draws import Draws

BAR = "\x7f"  # what code 95 becomes
DOCUMENTS = 200


class Reader:
    """Rows of text back to fields, tables, lines and bars; a page's kind is told by its looks."""

    def __init__(self, pages):
        self.fields, self.cells, self.lines, self.bars = [], [], [], []
        self.rows = [["".join(chr(32 + code) for code in row) for row in page] for page in pages]
        for number, rows in enumerate(self.rows):
            rows = [row for row in rows if row.strip()]
            if any(BAR in row for row in rows):
                self._chart(rows)
            elif rows[0].startswith(" " * 8) and ": " not in rows[0] and not rows[1].startswith(" "):
                self._table(rows)
            elif all(": " in row for row in rows):
                self.fields += [(number, *row.strip().split(": ", 1)) for row in rows]
            else:
                self.lines.append([row.rstrip() for row in rows])

    def _table(self, rows):
        heads = list(re.finditer(r"\S+", rows[0]))
        for row in rows[1:]:
            for head, following in zip(heads, [*heads[1:], None], strict=True):
                value = row[head.start() : following.start() if following else None]
                self.cells.append((head[0], row[: heads[0].start()].strip(), value.strip()))

    def _chart(self, rows):
        zero, tick = re.finditer(r"\d+", rows[-1])
        assert zero[0] == "0"
        for row in rows[:-1]:
            label, bar = row[: zero.start()].strip(), row[zero.start() :].rstrip()
            assert bar == BAR * len(bar) and bar and label
            value, rest = divmod(len(bar) * int(tick[0]), tick.start() - zero.start())
            assert rest == 0
            self.bars.append((label, value))

    def labels(self):
        """Everything by which something is named."""
        rows = {label for _, label, _ in self.cells}
        first = [line.split()[0] for page in self.lines for line in page]
        return [key for _, key, _ in self.fields] + sorted(rows) + first + [label for label, _ in self.bars]

    def value(self, key):
        """Values under a key."""
        return [value for _, other, value in self.fields if other == key]

    def answers(self, question):
        """Every answer that the pages allow."""
        patterns = (
            (r"What is the (.+)\?", lambda key: self.value(key) or ["none"]),
            (r"Larger of (.+) and (.+)\?", lambda a, b: [str(max(int(x), int(y))) for x in self.value(a) for y in self.value(b)]),
            (r"Page of the (.+)\?", lambda key: [str(number + 1) for number, other, _ in self.fields if other == key]),
            (r"What is (\S+) of (\S+)\?", lambda head, label: [v for h, other, v in self.cells if (h, other) == (head, label)]),
            (r"How many are (\S+)\?", lambda state: [str(sum(value == state for *_, value in self.cells))]),
            (r"Copy the line (\S+)", lambda word: [line for page in self.lines for line in page if line.split()[0] == word]),
            (r"Copy line (\d+)", lambda number: [page[int(number) - 1] for page in self.lines]),
            (r"How much is (\S+)\?", lambda label: [str(value) for other, value in self.bars if other == label]),
        )
        (found,) = ([answer(*match.groups())] for pattern, answer in patterns if (match := re.fullmatch(pattern, question)))
        return found[0]


@pytest.fixture(scope="module")
def documents():
    """[(content, its Reader)]"""
    kinds, skills = bundled.SETS["mixed"]
    contents = [
        bundled.document_about(Draws(f"mixed/evaluation/0/{number}"), skills[number % len(skills)], kinds)[0] for number in range(DOCUMENTS)
    ]
    return [(content, Reader(content.pages)) for content in contents]


def test_the_answers_of_samples_stand_on_their_pages():
    kinds, skills = bundled.SETS["mixed"]
    for number in range(DOCUMENTS):
        skill = skills[number % len(skills)]
        content, question = bundled.document_about(Draws(f"mixed/evaluation/0/{number}"), skill, kinds)
        assert question.skill == skill
        assert Reader(content.pages).answers(question.text) == [question.answer], (number, question)


@pytest.mark.parametrize("skill", bundled.SKILLS)
def test_every_question_has_one_answer(documents, skill):
    asked = []
    for number, (content, reader) in enumerate(documents):
        draws = Draws(f"questions/{number}")
        for _ in range(5):
            question = bundled.ASKERS[skill](draws, content)
            if question is not None:
                assert reader.answers(question.text) == [question.answer], (number, question)
                asked.append(question)
    assert len(asked) > 100 and {question.skill for question in asked} == {skill}
    assert len({question.text for question in asked}) > len(asked) / 4 or skill in ("ordinal", "count")
    if skill == "missing":
        assert 0.4 < sum(question.answer == "none" for question in asked) / len(asked) < 0.6
    if skill in ("page", "ordinal", "larger"):  # no answer is much more likely than chance
        assert Counter(question.answer for question in asked).most_common(1)[0][1] < 0.6 * len(asked)
    longest = max(len(question.text) for question in asked), max(len(question.answer) for question in asked)
    assert longest[0] <= 40 and longest[1] <= 20


def test_what_is_written_is_what_is_remembered(documents):
    for content, reader in documents:
        assert [(f.page, f.key, f.value) for f in content.fields] == reader.fields
        assert [f.number for f in content.fields] == [int(value) if value.isdigit() else None for *_, value in reader.fields]
        assert content.cells == reader.cells and content.bars == reader.bars
        assert content.lines == [line for page in reader.lines for line in page]
        assert all(page.dtype == np.uint8 and page.shape == (20, 20) for page in content.pages)


def test_labels_of_a_document_are_unique(documents):
    for content, reader in documents:
        labels = reader.labels()
        assert len(set(labels)) == len(labels)
        cells = [(head, label) for head, label, _ in reader.cells]
        assert len(set(cells)) == len(cells)
        assert len(content.states) <= 1


def test_absent_keys_are_absent_and_look_like_present_ones(documents):
    absent = 0
    for content, reader in documents:
        words = {key.split()[0] for _, key, _ in reader.fields}
        for key in content.absent_keys:
            assert key not in reader.labels() and key.split()[0] in words
        absent += len(content.absent_keys)
    assert absent > DOCUMENTS


def test_a_family_shares_its_word(documents):
    families = Counter()
    for number, (_, reader) in enumerate(documents):
        families.update((number, key.split()[0]) for _, key, _ in reader.fields)
    assert max(families.values()) == 5 and sum(size > 1 for size in families.values()) > len(families) / 2


def test_equal_column_names_do_not_name_a_cell_alone(documents):
    # Neither the row nor the column of a question may be enough.
    for content, reader in documents:
        for head, label, value in reader.cells:
            row = {v for h, other, v in reader.cells if other == label and h != head}
            assert row or not value  # every row has another column
        assert content.kinds.count("table") == 0 or len(reader.cells) >= 10
