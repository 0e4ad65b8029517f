"""Exact match of a saved checkpoint per skill of `mixed`, by nothing but the library's own `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from .bundled import bundled


@torch.inference_mode()
def exact_match(folder: Path, processor: Any, documents: int, device: torch.device, batch_size: int = 48) -> dict[str, float]:
    """Fraction of the first `documents` evaluation documents answered exactly: {"all", and every skill}."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.to(device).eval()
    right: dict[str, list[bool]] = {"all": []}
    samples = bundled.BundledSet("mixed", "evaluation").iterate(documents)
    while batch := [sample for _, sample in zip(range(batch_size), samples, strict=False)]:
        prompts = []
        for sample in batch:
            content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.question}]
            prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images = [list(sample.images) for sample in batch]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt").to(device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for sample, text in zip(batch, texts, strict=True):
            hit = text.strip() in sample.answers
            right["all"].append(hit)
            right.setdefault(sample.skill, []).append(hit)
    return {group: sum(hits) / max(len(hits), 1) for group, hits in right.items()}
