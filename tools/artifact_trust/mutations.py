"""Damaged and hostile artifacts, each made from a sound one by one to three mutations; a case follows from its number and the seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from .case import CARRIED, CONFIG, REPORT, TENSORS, Case
from .tensor_mutations import header, numbers
from .text_mutations import json_tree, text


def make_case(bases: list[dict[str, bytes]], seed: int, number: int) -> Case:
    """Case `number`: 1 mutation in 7 of 10 cases, 2 in 2, 3 in 1; the recorded checksum is made right again in most."""
    rng = random.Random(f"{seed}:{number}")
    case = Case(dict(rng.choice(bases)))
    for _ in range(rng.choices((1, 2, 3), (7, 2, 1))[0]):
        mutate = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
        before = case.files.get(TENSORS)
        mutate(rng, case)
        if case.files.get(TENSORS) != before and rng.random() < 0.7:
            _record_checksum(case)
    return case


def _record_checksum(case: Case) -> None:
    """What a hostile writer does: the config names the checksum of the damaged file, so that deeper checks are reached."""
    config, tensors = case.files.get(CONFIG), case.files.get(TENSORS)
    if isinstance(config, bytes) and isinstance(tensors, bytes):
        try:
            data = json.loads(config)
            data["files"][TENSORS]["sha256"] = hashlib.sha256(tensors).hexdigest()
            case.files[CONFIG] = json.dumps(data).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        case.done.append("checksum recorded")


def _files(rng: random.Random, case: Case) -> None:
    """No file, or something else than a file."""
    name = rng.choice((CONFIG, TENSORS, REPORT, CARRIED[0], "adapter_config.json", "additional_chat_templates", "tokenizer.json"))
    what: Any = rng.choice(
        (
            None,
            b"",
            b"{}",
            ("directory",),
            ("pipe",),
            ("sparse", 1 << 24),
            ("sparse", 1 << 42),
            ("link", "/etc/passwd"),
            ("link", "/dev/zero"),
            ("link", name),
            ("link", "."),
            ("link", "../outside.json"),
            ("link", REPORT),
            ("link", "nowhere"),
        )
    )
    case.files.pop(name, None)
    if what is not None:
        case.files[name] = what
    case.done.append(f"{name}: {what}")


MUTATIONS: dict[Callable[[random.Random, Case], None], int] = {json_tree: 6, text: 4, header: 5, numbers: 3, _files: 2}
