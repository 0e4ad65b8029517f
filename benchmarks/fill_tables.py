"""Put the tables that the scripts of this folder print from benchmarks/results/ between their markers in README and docs.

    python benchmarks/fill_tables.py            # write them
    python benchmarks/fill_tables.py --check    # only say whether they are what the committed results print

A marker is a pair of comments, `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
MODELS = ("tiny-llava-next", "tiny-qwen3-vl")


def prints() -> dict[tuple[str, str], list[list[str]]]:
    """For each (file, marker) the commands whose outputs stand there, one after the other."""
    suites = {model: f"rivals-{model}.csv" for model in MODELS}
    found = {
        ("README.md", "suite"): [["print_suite.py", *suites.values()]],
        ("README.md", "decode"): [["print_decode.py"]],
        ("docs/backbones.md", "skills"): [["check_skills.py", "--print", f"skills-{model}.csv"] for model in MODELS],
        ("docs/backbones.md", "knockout"): [["knockout.py", "--print", f"knockout-{model}.csv"] for model in MODELS],
    }
    found["docs/codec.md", "codec"] = [["print_codec.py", *measured("codec-{}.csv")]]
    found["docs/codec.md", "broken"] = [["bench_broken_inputs.py", "--print", file] for file in measured("broken-{}.csv")]
    found["docs/codec.md", "refresh"] = [["bench_refresh.py", "--print", file] for file in measured("refresh-{}.csv")]
    found["docs/codec.md", "plans"] = [["print_codec.py", "--plans", *measured("plans-{}.json")]]
    renewed = [["print_codec.py", "--plans", *measured("plans-t2-{}.json")], ["print_codec.py", "--chosen", "plans-t2.csv"]]
    found["docs/codec.md", "plans-t2"] = renewed
    found["docs/codec.md", "plans504"] = [["print_codec.py", "--plans", *measured("plans504-{}.json")]]
    files = ("rap-tiny-llava-next.csv", "rap-text9.csv", "rap-text.csv")
    found["docs/rap.md", "rap"] = [["bench_rap.py", "--print", file] for file in files]
    found["docs/rap.md", "stack"] = [["bench_stack.py", "--print", "stack-tiny-llava-next.csv"]]
    found["docs/evidence.md", "rotation"] = [["bench_rotation.py", "--print", file] for file in measured("rotation-{}.json")]
    for marker, script, name in (
        ("subspaces", "bench_subspaces.py", "subspaces.json"),
        ("rival-speed", "bench_rival_speed.py", "rival_speed.csv"),
        ("rap-latency", "bench_rap_latency.py", "rap_latency.csv"),
        ("counters", "count_decode.py", "decode_counters.csv"),
        ("step-parts", "step_parts.py", "step_parts.csv"),
        ("retire", "bench_retire.py", "retire.csv"),
        ("answers", "bench_answers.py", "answers.csv"),
    ):
        page = placed(marker)
        if page and (HERE / "results" / name).exists():
            known = [file for file in measured("proof-{}.csv")[:1] if marker == "rival-speed"]
            found[page, marker] = [[script, "--print", name, *(word for file in known for word in ("--results", file))]]
    found["docs/rivals.md", "proof"] = [["print_suite.py", file, "--versus"] for file in measured("proof-{}.csv")]
    found["docs/rivals.md", "proof-with"] = [["print_suite.py", file, "--versus"] for file in measured("proof-with-{}.csv")]
    found["docs/rivals.md", "palu"] = [["print_suite.py", file] for file in (*measured("palu-{}.csv"), *measured("palu32-{}.csv"))]
    found["docs/rivals.md", "evidence"] = [["print_suite.py", file, "--versus"] for file in measured("evidence-{}.csv")]
    found["docs/rivals.md", "tokens"] = [["bench_tokens.py", "--brief", "--print", "bench_tokens.csv"]]
    found["docs/codec.md", "encode"] = [["bench_encode.py", "--print", "encode.json"]]
    more = [
        ("decode-rates", "--rates"),
        ("decode-linear", "--linear", "decode_linear.csv"),
        ("decode-small", "--small", "decode_small.csv"),
        ("decode-baselines", "--baselines", "decode_baselines.csv"),
        ("steps", "--steps", "steps.csv"),
        ("steps-reached", "--reached", "steps.csv"),
    ]
    for marker, *words in more:
        page = placed(marker)
        if page and all((HERE / "results" / word).exists() for word in words[1:]):
            found[page, marker] = [["print_decode.py", *words]]
    for model, file in suites.items():
        found["docs/rivals.md", model] = [["print_suite.py", file], ["print_suite.py", file, "--skills"]]
    return found


def placed(marker: str) -> str | None:
    """The page that has this marker, from the repository's root; None if it is not in use."""
    pages = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
    found = (page for page in pages if f"<!-- {marker} -->" in page.read_text(encoding="utf-8"))
    return next((page.relative_to(HERE.parent).as_posix() for page in found), None)


def measured(name: str) -> list[str]:
    """Names of the results that there are, of all models."""
    return [file for model in MODELS if (HERE / "results" / (file := name.format(model))).exists()]


def printed(command: list[str]) -> str:
    """What a script of this folder prints; results are named without their folder."""
    words = [str(HERE / "results" / word) if word.endswith((".csv", ".json")) else word for word in command[1:]]
    script, out = str(HERE / command[0]), io.StringIO()
    with mock.patch.object(sys, "argv", [script, *words]), contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    return out.getvalue().strip()


def filled(text: str, marker: str, inside: str) -> str:
    """`text` with `inside` between the two comments of `marker`.

    Raises:
        ValueError: they do not stand in it once each.
    """
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(opening) != 1 or text.count(closing) != 1:
        raise ValueError(f"{opening} and {closing} must stand once each")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{inside}\n{closing}{rest.split(closing)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is another one")
    check = parser.parse_args().check
    stale = 0
    for (name, marker), commands in prints().items():
        file = HERE.parent / name
        text = file.read_text(encoding="utf-8")
        new = filled(text, marker, "\n\n".join(printed(command) for command in commands))
        if new != text:
            stale += 1
            print(f"{name}: {marker} {'is not what the results print' if check else 'written'}")
            if not check:
                file.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
