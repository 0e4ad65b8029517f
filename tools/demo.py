"""Ask an artifact of the bundled model three questions about documents it has never seen, dense and compressed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from rotatek_compile.answer import answer_once, comparison
from rotatek_compile.api import load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.calibration_data.bundled import BundledSet
from rotatek_compile.runtime.enable import enable

DOCUMENTS = (8, 4, 0)  # a chart on one page, a cell of a table among two, a field among three


def main(artifact_path: Path) -> int:
    """Answer, print both answers with bytes and times; 1 if a compressed answer differs from the reference."""
    warnings.filterwarnings("ignore")
    artifact = read_artifact(artifact_path)
    model, processor = load_base(artifact)
    wrong = 0
    for number in DOCUMENTS:
        sample = BundledSet("mixed", "evaluation").sample(number)
        images = list(sample.images)
        print(f"\n{len(images)} page(s). {sample.question}   (on the page: {sample.answers[0]})")
        with enable(model, artifact):
            compressed = answer_once(model, processor, images, sample.question, 24, stream=False)
        dense = answer_once(model, processor, images, sample.question, 24, stream=False)
        print(comparison(compressed, dense))
        wrong += compressed.text != sample.answers[0]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
