"""HTML and SVG as a tree, so that the standard library escapes every text and attribute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from xml.etree.ElementTree import Element, tostring

from .untrusted import printable


def node(tag: str, /, *children: Element | str | None, **attributes: Any) -> Element:
    """An element; None among the children or attributes is left out.

    Args:
        attributes: `class_` is `class`, other underscores are hyphens; numbers are written as short as a tenth allows.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: _value(value) for name, value in attributes.items() if value is not None})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None:
            if last is None:
                made.text = (made.text or "") + printable(child)
            else:
                last.tail = (last.tail or "") + printable(child)
    return made


def page_text(root: Element) -> str:
    """A whole document."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def tenth(x: float) -> str:
    """A coordinate to a tenth of a unit, which is less than a pixel."""
    text = f"{x:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text.replace("0.", ".", 1) if abs(x) < 1 and "." in text else text


def short(x: float) -> str:
    """A number for people: three digits, or two and an exponent."""
    if x == 0:
        return "0"
    return f"{x:.3g}" if 1e-3 <= abs(x) < 1e5 else f"{x:.1e}"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Element:
    """Numbers become `short`; the first column heads its row."""
    body = [node("tr", *(_cell(value, n) for n, value in enumerate(row))) for row in rows]
    return node("table", node("thead", node("tr", *(node("th", str(h), scope="col") for h in head))), node("tbody", *body))


def _cell(value: Any, column: int) -> Element:
    text = short(float(value)) if isinstance(value, float) else str(value)
    return node("th", text, scope="row") if column == 0 else node("td", text)


def _value(value: Any) -> str:
    return tenth(value) if isinstance(value, float) else printable(str(value))
