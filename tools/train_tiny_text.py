"""Train a small text-only Llama on text that every installation has, for measuring what pruning costs a language model.

    python tools/train_tiny_text.py --seconds 200 --output DIR --work DIR                      # 9 M parameters, on a GPU
    python tools/train_tiny_text.py --small --seconds 1000 --output DIR --work DIR             # 1.2 M parameters, on one CPU core

The text is docstrings of the standard library and of our dependencies (tiny_training/library_text.py), one file in twenty held out. GQA,
D 64, byte-pair tokens. --output gets a stock checkpoint (float32), `calibration.jsonl` and `evaluation.jsonl` in the form of local data
(`--calib`, `--data`: a passage as the question, what follows it as the answer), and `held_out.txt`; --work gets log and result. Weights
are not committed: logs are, in tools/training_logs/.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
started = time.monotonic()

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from tiny_training.library_text import PACKAGES, collect  # noqa: E402

SPECIAL = ("<pad>", "<eos>", "<bos>")
PAD, EOS, BOS = range(3)
SMALL = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "feed_forward": 352, "vocabulary": 2048, "rows": 4, "length": 256}
LARGE = {"hidden": 256, "layers": 8, "heads": 8, "kv_heads": 4, "feed_forward": 704, "vocabulary": 8192, "rows": 64, "length": 512}


def build_tokenizer(texts: list[str], vocabulary: int, longest: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of bytes, learned from the texts; a text begins with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, learner)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[EOS], bos_token=SPECIAL[BOS], model_max_length=longest
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def build_model(sizes: dict[str, int], length: int, seed: int) -> LlamaForCausalLM:
    """Random weights, float32; embedding and output share theirs."""
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["feed_forward"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"], head_dim=64,
        max_position_embeddings=length, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=64)
    return model


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts one behind the other, each between <bos> and <eos>: int64 [N]."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (BOS, *row, EOS)], dtype=torch.int64)


def rate(progress: float, step: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: a short rise, then half a cosine down to a twentieth."""
    return peak * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, length: int, device: torch.device, windows: int = 200) -> tuple[float, int]:
    """Perplexity over the first windows of `length` tokens, and the number of predicted tokens."""
    rows = ids[: len(ids) // length * length].view(-1, length)[:windows]
    total = 0.0
    for part in rows.split(16):
        logits = model(input_ids=part.to(device)).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(device), reduction="sum"))
    count = rows[:, 1:].numel()
    return math.exp(total / max(count, 1)), count


def train(
    model: Any, ids: Tensor, held_out: Tensor, args: argparse.Namespace, device: torch.device, sizes: dict[str, int]
) -> list[dict[str, float]]:
    """Train in place for `--seconds`, at most `--epochs`; -> what was logged."""
    length, rows = sizes["length"], sizes["rows"]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.peak_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    draw = torch.Generator().manual_seed(args.seed)
    forward = torch.compile(model) if device.type == "cuda" and not args.no_compile else model
    starts = torch.arange(length)
    log: list[dict[str, float]] = []
    begun, logged, step, sum_, count = time.monotonic(), 0.0, 0, torch.zeros((), device=device), 0
    ids = ids.to(device)
    last = int(args.epochs * len(ids) / (rows * length)) if args.max_steps is None else args.max_steps
    while (elapsed := time.monotonic() - begun) < args.seconds and step < last:
        places = torch.randint(len(ids) - length - 1, (rows,), generator=draw)[:, None] + starts
        batch = ids[places.to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = forward(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(max(elapsed / args.seconds, step / last), step, args.peak_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sum_, count, step = sum_ + loss.detach(), count + 1, step + 1
        if elapsed - logged > args.log_every:
            model.eval()
            held = perplexity(model, held_out, length, device, 16)[0]
            model.train()
            row = {"seconds": round(elapsed, 1), "step": step, "tokens": step * rows * length, "loss": float(sum_) / count}
            log.append(row | {"held_out": held})
            print(json.dumps(log[-1]), flush=True)
            logged, sum_, count = elapsed, torch.zeros((), device=device), 0
    return log


def write_passages(file: Path, texts: list[str], count: int, size: int) -> None:
    """`question` and `answer`: two consecutive passages of `size` characters, one pair per text, evenly over all that are long enough."""
    long = [text for text in texts if len(text) >= 2 * size]
    chosen = [long[n * len(long) // count] for n in range(count)] if len(long) >= count else long
    rows = [{"question": text[:size], "answer": text[size : 2 * size]} for text in chosen]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="training time; reading the text, tokens and evaluation excluded")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the data files")
    parser.add_argument("--work", type=Path, required=True, help="folder for log and result")
    parser.add_argument("--small", action="store_true", help="the size for one CPU core")
    parser.add_argument("--geometry", default="", help=f"overrides such as layers=5,rows=16, of {', '.join(LARGE)}")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="whose docstrings are read beside the standard library's")
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--log-every", type=float, default=30.0)
    parser.add_argument("--epochs", type=float, default=10.0, help="at most so many times the text: more would learn it by heart")
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that read the sources")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    sizes = (SMALL if args.small else LARGE) | {k: int(v) for k, v in (pair.split("=") for pair in args.geometry.split(",") if pair)}
    corpus = collect(tuple(args.packages), args.workers)
    print(f"{corpus.facts} after {time.monotonic() - started:.0f} s", flush=True)
    tokenizer = build_tokenizer(corpus.training[::4], sizes["vocabulary"], 4 * sizes["length"])
    ids, held_out = stream(tokenizer, corpus.training), stream(tokenizer, corpus.held_out)
    model = build_model(sizes, 4 * sizes["length"], args.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(ids):,} tokens, {len(held_out):,} held out: {time.monotonic() - started:.0f} s", flush=True)
    log = train(model.train(), ids, held_out, args, device, sizes)
    model.eval()
    value, count = perplexity(model, held_out, sizes["length"], device)
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    size = int(0.45 * sizes["length"] * sum(map(len, corpus.training)) / len(ids))  # two of them are nearly what was trained on
    write_passages(args.output / "calibration.jsonl", corpus.training, 512, size)
    write_passages(args.output / "evaluation.jsonl", corpus.held_out, 256, size)
    (args.output / "held_out.txt").write_text("\n\n".join(corpus.held_out), encoding="utf-8")
    result = {
        "parameters": parameters, "sizes": sizes, "seconds": args.seconds, "seed": args.seed, "tokens": len(ids),
        "held_out_perplexity": value, "held_out_tokens": count, "corpus": corpus.facts, "torch": torch.__version__,
        "transformers": transformers.__version__, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }  # fmt: skip
    (args.work / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with (args.work / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["seconds", "step", "tokens", "loss", "held_out"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    weights = sum(f.stat().st_size for f in args.output.glob("*.safetensors"))
    seconds = time.monotonic() - started
    print(f"perplexity {value:.2f} over {count:,} held-out tokens; weights of {weights:,} bytes; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
