"""Damaged safetensors: a header that lies, numbers that no sound writer stores."""

from __future__ import annotations

import json
import random
import struct

from .case import TENSORS, Case
from .text_mutations import damaged_json

NUMBERS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 3e38, -3e38, 1e-30, 1e30, 65504.0]


def header(rng: random.Random, case: Case) -> None:
    """The header's JSON, its entries or its length; the data stay."""
    content = case.files.get(TENSORS)
    if not isinstance(content, bytes) or len(content) < 8:
        return
    length = struct.unpack("<Q", content[:8])[0]
    head, data = content[8 : 8 + length], content[8 + length :]
    action = rng.choice(("tree", "tree", "shape", "shape", "offsets", "offsets", "dtype", "name", "swap", "extra", "length", "pad", "gap"))
    case.done.append(f"header: {action}")
    if action == "tree":
        head = damaged_json(rng, head, case, "header")
    elif action == "length":
        length = rng.choice((0, 1, length - 1, length + 1, len(content), len(content) * 2, 1 << 31, 1 << 40, (1 << 64) - 1))
        case.files[TENSORS] = struct.pack("<Q", length) + head + data
        return
    elif action == "pad":
        head += b" " * rng.choice((1, 7, 4096, 5 << 20))
    elif action == "gap":
        data = rng.randbytes(rng.choice((1, 64))) + data
    else:
        head, data = _entries(rng, head, data, action)
    case.files[TENSORS] = struct.pack("<Q", len(head)) + head + data


def _entries(rng: random.Random, head: bytes, data: bytes, action: str) -> tuple[bytes, bytes]:
    try:
        table = json.loads(head)
        names = [name for name in table if name != "__metadata__" and isinstance(table[name]["data_offsets"], list)]
        name, other = rng.choice(names), rng.choice(names)
        entry = table[name]
        if action == "shape":
            size = entry["shape"]
            huge = rng.choice((-1, 0, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 10**18, 2.5, "2", None))
            entry["shape"] = rng.choice(
                ([huge, *size[1:]], [*size, 1], size[1:], size[::-1], [huge], [0, huge], [huge] * 5, [1] * 5000, [])
            )
        elif action == "offsets":
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(
                (
                    [end, begin],
                    [begin, end + 4],
                    [begin + 4, end],
                    [begin + 4, end + 4],
                    [-4, end],
                    [begin],
                    [begin, 1 << 62],
                    [0, end - begin],
                    [begin, end, end],
                    ["0", end],
                    [float(begin), end],
                    table[other]["data_offsets"],
                )
            )
        elif action == "dtype":
            entry["dtype"] = rng.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "x" * 999, 7, None)
            )
        elif action == "name":
            table[rng.choice(("../../x", "", "layers.0.knockout", "layers.99.key_plan", "\x1b[2J", "x" * 5000, other))] = table.pop(name)
        elif action == "swap":
            entry["data_offsets"], table[other]["data_offsets"] = table[other]["data_offsets"], entry["data_offsets"]
        else:  # a further tensor, whole
            size = rng.choice((0, 4, 4096, 1 << 20))
            table["extra"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
            data += bytes(size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return head, data  # an earlier mutation left nothing to work on
    return json.dumps(table).encode(), data


def numbers(rng: random.Random, case: Case) -> None:
    """Other numbers in a whole file: what a faulty or hostile writer would store."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    content = case.files.get(TENSORS)
    try:
        tensors = load(content) if isinstance(content, bytes) else {}
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError):
        return
    if not tensors:
        return
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    if tensor.dtype not in (torch.float32, torch.int32):
        tensor = tensor.double()  # an earlier cast: too narrow for some of NUMBERS
    action = rng.choice(("entry", "entry", "fill", "scale", "equal rows", "drop", "cast", "rank"))
    if action == "drop":
        del tensors[name]
    elif action == "cast":
        tensors[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)))
    elif action == "rank":
        name = rng.choice([n for n in tensors if n.endswith(("key_rank", "_plan"))] or [name])
        tensors[name] = torch.randint(-16, 40, tensors[name].shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30))).int()
    elif tensor.numel():
        number = rng.choice(NUMBERS) if tensor.is_floating_point() else rng.choice((-8, 7, 8, 24, 1 << 30, -(1 << 31)))
        if action == "entry":
            tensor.view(-1)[rng.randrange(tensor.numel())] = number
        elif action == "fill":
            tensor.fill_(number)
        elif action == "scale" and tensor.is_floating_point():
            tensor *= rng.choice((0.0, -1.0, 1e-20, 1e20, 1e-38, 1e38))
        elif tensor.dim() > 1:
            tensor[..., 0, :] = tensor[..., -1, :]
        tensors[name] = tensor
    case.done.append(f"numbers: {action} of {name}")
    case.files[TENSORS] = save({key: value.contiguous() for key, value in tensors.items()}, metadata={"format": "pt"})
