"""Greedy answers of a pruned model whose attention runs the Triton kernels, in the interpreter, beside those of torch; one line of JSON.

`TRITON_INTERPRET=1 python tools/run_in_checkout.py tests/runtime/rap_interpreted.py`: a process of its own, because Triton reads that
when kernels are decorated.
"""

import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from rap_cases import builders, dense_of, drawn_plan, prompts, pruned_of, said  # noqa: E402

from rotatek_compile.runtime import rap_kernels  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    torch.cuda.is_current_stream_capturing = lambda: False
    with tempfile.TemporaryDirectory() as folder:
        source = builders.build("llama", Path(folder) / "llama")
        _, geometry, _ = dense_of(source)
        model = pruned_of(source, Path(folder) / "pruned", geometry, drawn_plan(geometry))
    inputs = prompts(padding=0)
    tokens, logits, _ = said(model, **inputs)
    calls: Counter[str] = Counter()
    for module, name in ((rap_kernels.pairs, "turn"), (rap_kernels.narrow, "narrow_attention")):
        setattr(module, name, counted(getattr(module, name), name, calls))
    rap_kernels.runs_on = lambda device: True
    own, found, _ = said(model, **inputs)
    with rap_kernels.left_out():
        said(model, **inputs)
    proven = list(rap_kernels._proven.values())
    error = float((found - logits).abs().max() / logits.abs().max())
    print(json.dumps({"same": torch.equal(tokens, own), "error": error, "calls": calls, "proven": proven}))


def counted(function, name, calls):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    main()
