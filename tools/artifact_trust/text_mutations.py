"""Damaged JSON and damaged bytes."""

from __future__ import annotations

import json
import random
from typing import Any

from .case import CARRIED, CONFIG, REPORT, TENSORS, Case

DEEP = (40, 2_000, 100_000)

# JSON texts that are put in the place of a value: wrong types, extremes, names that lead elsewhere, text that terminals obey.
VALUES = [
    *("null", "true", "false", "0", "-1", "1", "7", "8", "16", "-0", "0.5", "1.0", "16.0", "-0.25", '"16"', "[]", "{}", "[0, 8, 16]"),
    *("1e400", "-1e400", "1e308", "1e-400", "NaN", "Infinity", "-Infinity", "9" * 30, "9" * 5000, str(1 << 31), str(1 << 63), str(10**18)),
    *('""', '"x"', '"../../../etc/passwd"', '"/etc/passwd"', '"..\\\\..\\\\x"', '"file:///etc/passwd"', '"evil/repo"', '"refs/pr/1"'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"\\u202egpj"', '"a\\nb"', '"full_attention"', '"head-drop"', '"kivi4"', '"all"', '"pca"'),
    *('"<script>alert(1)</script>"', '"\\"><img src=x onerror=alert(1)>"'),
    *('{"a": {"b": 1}}', '"' + "x" * 100_000 + '"', *("[" * n + "]" * n for n in DEEP[:2]), "[" * DEEP[2]),
]  # fmt: skip
HOSTILE_KEYS = ["auto_map", "audio_tokenizer", "tokenizer_file", "vocab_file", "fast_tokenizer_files", "use_pretrained_backbone", "../x"]


def json_tree(rng: random.Random, case: Case) -> None:
    name = rng.choices((CONFIG, REPORT, *CARRIED), (12, 2, 1, 1))[0]
    if isinstance(content := case.files.get(name), bytes):
        case.files[name] = damaged_json(rng, content, case, name)


def damaged_json(rng: random.Random, content: bytes, case: Case, name: str) -> bytes:
    """One change somewhere in the tree of a JSON text."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return content
    holders = list(_holders(tree))
    if not holders:
        return content
    holder, key = rng.choice(holders)
    raw: dict[str, str] = {}

    def put(text: str) -> str:
        raw[mark := f"@@{len(raw)}@@"] = text
        return mark

    action = rng.choice(("value", "value", "value", "delete", "twice", "new", "rename", "swap", "repeat", "nudge"))
    if action == "value":
        holder[key] = put(chosen := rng.choice(VALUES))
        action += f" {chosen[:30]}"
    elif action == "delete":
        del holder[key]
    elif action == "twice" and isinstance(holder, dict):
        holder[f"@@twice@@{key}"] = put(rng.choice(VALUES))
    elif action == "new" and isinstance(holder, dict):
        holder[rng.choice((*HOSTILE_KEYS, "mood", "x" * 5000, "\x1b[2J", "trust_remote_code"))] = put(rng.choice(VALUES))
    elif action == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif action == "swap":
        other, place = rng.choice(holders)
        if other is holder or not (_within(other[place], holder) or _within(holder[key], other)):
            holder[key], other[place] = other[place], holder[key]
    elif action == "repeat" and isinstance(holder, list):
        holder *= rng.choice((2, 3, 50, 2000))
    elif action == "nudge" and isinstance(holder[key], (int, float)):
        old = holder[key]
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old / 3, old + 8, bool(old)))
    case.done.append(f"{name}: {action} at {str(key)[:40]}")
    text = json.dumps(tree).replace("@@twice@@", "")
    for mark, value in raw.items():
        text = text.replace(f'"{mark}"', value)
    return text.encode()


def _holders(tree: Any) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _holders(tree[key])


def _within(value: Any, holder: Any) -> bool:
    return value is holder or any(inner is holder for at, key in _holders(value) for inner in (at, at[key]))


def text(rng: random.Random, case: Case) -> None:
    name = rng.choices((CONFIG, REPORT, TENSORS, *CARRIED), (6, 2, 6, 1, 1))[0]
    if isinstance(content := case.files.get(name), bytes):
        case.files[name] = damaged_bytes(rng, content, case, name)


def damaged_bytes(rng: random.Random, content: bytes, case: Case, name: str) -> bytes:
    """Flipped bits, cuts, insertions; or another text altogether."""
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 64, 4096))
    action = rng.choice(("flip", "flip", "cut", "insert", "remove", "double", "mark", "utf-16", "other"))
    case.done.append(f"{name}: {action} at byte {at}")
    if action == "flip" and content:
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 32))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if action == "insert":
        return content[:at] + rng.randbytes(length) + content[at:]
    if action == "remove":
        return content[:at] + content[at + length :]
    if action == "double":
        return content[:at] + content[at : at + length] * rng.choice((2, 3, 100)) + content[at + length :]
    if action == "mark":
        return b"\xef\xbb\xbf" + content
    if action == "utf-16":
        return content.decode("latin-1").encode("utf-16")
    if action == "other":
        wide = b'{"a": [' + b"[]," * rng.choice((100_000, 2_000_000)) + b"0]}"
        deep = rng.choice(DEEP)
        return rng.choice((b"", b"null", b"[]", b"{}", b'"text"', rng.randbytes(300), b" " * 2_000_000, b"[" * deep, b'{"a":' * deep, wide))
    return content[:at]
