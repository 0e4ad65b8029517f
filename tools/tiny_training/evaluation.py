"""Exact match of a saved checkpoint on `forms`, by nothing but the library's own processor and `generate`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .bundled import forms


@torch.inference_mode()
def exact_match(folder: Path, documents: int, device: torch.device, batch_size: int = 32) -> dict[str, float]:
    """Fraction of the first `documents` evaluation documents answered exactly: {"all", "1", "2", "3" (by number of pages)}."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right: dict[str, list[bool]] = {}
    samples = forms.Forms("evaluation").iterate(documents)
    while batch := [sample for _, sample in zip(range(batch_size), samples, strict=False)]:
        prompts = []
        for sample in batch:
            content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.question}]
            prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images = [list(sample.images) for sample in batch]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt").to(device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for sample, text in zip(batch, texts, strict=True):
            hit = text.strip() in sample.answers
            for group in ("all", str(len(sample.images))):
                right.setdefault(group, []).append(hit)
    return {group: sum(hits) / len(hits) for group, hits in sorted(right.items())}
