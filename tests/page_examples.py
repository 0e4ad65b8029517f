"""The examples of README, CONTRIBUTING and docs, read out of their Markdown: fenced, indented, or a command within a sentence."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = r"rotatek(?:-\w+)?|torchrun|accelerate|python|make|hf|pip|bash|\.ci/run"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS})(?: \S.*)")  # a program alone is a name, not an example
FENCED = re.compile(r"^ *(`{3,}|~{3,})([^\n]*)\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:(?:    .*)?\n)*    .*\n")
SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Example:
    """`kind` is a fence's language, `indented` or `inline`; `text` is one command without its comment, or a whole block."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self):
        return shlex.split(self.text)


def pages():
    """All pages, as paths below the repository."""
    return ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def blank(match):
    """Nothing in its place, but as many lines."""
    return re.sub(r"[^\n]", "", match[0])


def commands(lines):
    """(offset, command) of a block of shell lines, continued ones joined, comments taken off."""
    joined, start = "", 0
    for offset, line in enumerate(lines.splitlines()):
        start = start if joined else offset
        joined += f" {line.strip()}" if joined else line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip()
            continue
        command = re.sub(r"(^|\s+)# .*$", "", joined)
        if command:
            yield start, command
        joined = ""


def examples(page):
    """Every example of a page, in its order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []

    def take(match, kind, body, group):
        first = text.count("\n", 0, match.start(group)) + 1
        if kind in ("bash", "indented"):
            found.extend(Example(page, first + offset, kind, command) for offset, command in commands(body))
        else:
            found.append(Example(page, first, kind, body))

    for match in FENCED.finditer(text):
        take(match, match[2].strip() or "no language", match[3], 3)
    text = FENCED.sub(blank, text)
    for match in INDENTED.finditer(text):
        take(match, "indented", textwrap.dedent(match[0]), 0)
    text = INDENTED.sub(blank, text)
    for match in SPAN.finditer(text):
        span = " ".join(match[1].split())
        if COMMAND.fullmatch(span):
            take(match, "inline", span, 0)
    return sorted(found, key=lambda example: example.line)


def spans(page):
    """What a page has in backquotes outside its blocks."""
    text = INDENTED.sub(blank, FENCED.sub(blank, (ROOT / page).read_text(encoding="utf-8")))
    return [" ".join(span.split()) for span in SPAN.findall(text)]


def named_paths(page):
    """Files and folders of the repository that a page names in backquotes, placeholders like NAME.py left out."""
    for span in spans(page):
        for word in span.split():
            folder = re.fullmatch(r"(?:\w+/)+", word) and not word[0].isupper()
            if folder or (re.fullmatch(r"\.?[a-z_]\w*(?:/[\w.-]+)*\.(?:py|md|cfg)", word) and word.split("/")[-1] != "NAME.py"):
                yield word


def play(page, handlers, special):
    """Give every example of a page to the function that runs it: `special` by its text, else `handlers` by its program or kind of block.

    Fails for an example that no function takes, and for a special one that the page does not have.
    """
    unused = set(special)
    for example in examples(page):
        block = example.kind not in ("bash", "indented", "inline")
        program = next((word for word in example.text.split() if "=" not in word), "").split("-")[0]
        handle = special.get(example.text) or handlers.get(f"{example.kind} block" if block else program)
        assert handle, f"nothing tests this example; give it a function where {page} is played:\n{example}"
        unused.discard(example.text)
        handle(example)
    assert not unused, f"{page} no longer has {unused}"
