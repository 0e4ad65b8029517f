"""rotatek-eval: exact match, KL to the dense model, and bytes, of an artifact and of rivals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import aliases
from ..errors import RotateKError, UsageError
from ..names import ASK, METHODS, POOR, SAYS_LITTLE, SUITES, TOKEN_METHODS, check_fraction, refuse_unknown
from ..parallel import launched
from .completion import DEVICES, DTYPES, complete_data, complete_model, one_of, paths


@click.command("eval", help="Measure ARTIFACT (a directory, or ORG/NAME on the Hub) against the dense model and other methods.")
@click.argument("artifact", shell_complete=paths("dir"))
@click.option(
    "--data",
    required=True,
    shell_complete=complete_data,
    help="Data set name, local path or Hub id; rotatek-compile --list-data shows names.",
)
@click.option("--data-revision", help="Branch, tag or commit of data on the Hub.")
@click.option(
    "--ask",
    shell_complete=one_of(ASK),
    help="after: the question comes once the images are compressed; with: before.  [default: after; suites: both]",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    shell_complete=one_of(METHODS),
    help="Another method too: rotatek or a rival; may repeat.",
)
@click.option("--kv-budget", "budgets", type=float, multiple=True, metavar="F", help="A --method's KV bytes over dense ones; may repeat.")
@click.option("--keep-ratio", "ratios", type=float, multiple=True, metavar="F", help="What a --method keeps of Keys or heads; may repeat.")
@click.option(
    "--token-method",
    "token_methods",
    multiple=True,
    shell_complete=one_of(TOKEN_METHODS),
    help="Run every --method on a share of each image's tokens: fastv, visionzip, divprune, snapkv; without --method these stay as they "
    "are; may repeat.",
)
@click.option("--token-keep-ratio", "token_ratios", type=float, multiple=True, metavar="F", help="That share; may repeat.")
@click.option("--suite", shell_complete=one_of(SUITES), help="A whole comparison: rivals, or proof (also Keys beside equal Values).")
@click.option(
    "--also",
    multiple=True,
    metavar="ARTIFACT",
    shell_complete=paths("dir"),
    help="With --suite: the same model calibrated anew, as with another --seed; intervals then hold for calibration too; may repeat.",
)
@click.option(
    "--learned",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    shell_complete=paths("file"),
    help="What a rival learned by training on the artifact's model (leank-learned, palu); may repeat.",
)
@click.option("--quick", is_flag=True, help="Only 12 documents: minutes on a small machine.")
@click.option("--num-samples", type=int, help="Documents.  [default: 50]")
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--max-new-tokens", type=int, help="Longest answer.  [default: 32, or what the benchmark allows]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", type=click.Choice(["auto", "triton", "torch", "reconstruct"]), default="auto", show_default=True)
@click.option("--no-fallback", is_flag=True, help="Never keep more than planned.")
@click.option("--model", shell_complete=complete_model, help="Base weights other than the recorded ones.")
@click.option("--revision", help="Branch, tag or commit of an artifact on the Hub.")
@click.option("--dtype", shell_complete=one_of(DTYPES), help="float32, float16 or bfloat16.")
@click.option("--device", shell_complete=one_of(DEVICES), help="cpu, cuda, cuda:N, or auto: spread over all GPUs.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results.csv and documents.jsonl.")
@click.option("--resume", is_flag=True, help="Go on with the evaluation in --output.")
@click.option("--shard", metavar="I/N", help="Measure each N-th batch from the I-th; --resume without it puts all N together.")
@click.option("--plot", is_flag=True, help="Draw the results into --output (needs matplotlib).")
@click.option("--write-card", is_flag=True, help="Write the figures into the artifact's model card (README.md).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(artifact: str, data: str, **options: Any) -> None:
    _check(options)
    _check_names(data, options)
    asks = (options["ask"],) if options["ask"] else ASK if options["suite"] else ASK[:1]
    measured, samples = _measure(artifact, data, asks, options)
    if options["shard"]:
        click.echo(f"part {options['shard']} is in {options['output']}; once all are, run without --shard and with --resume")
        return
    rows = [m.to_json() for m in measured]
    if options["as_json"]:
        result = {"data": data, "samples": samples, "ask": asks[0] if len(asks) == 1 else list(asks), "rows": rows}
        click.echo(json.dumps(result | ({"suite": options["suite"]} if options["suite"] else {})))
        return
    for ask in asks:
        click.echo(f"{data}, {samples} samples, question asked {ask} compression")
        own = [row for row in rows if row["ask"] == ask]
        _print(own)
        _print_remarks(own)


def _check(options: dict[str, Any]) -> None:
    if launched()[1] > 1:
        raise UsageError("rotatek-eval runs in one process; start it without torchrun, with --device auto to use several GPUs")
    known = (("ask", options["ask"], ASK), ("suite", options["suite"], SUITES), *(("method", name, METHODS) for name in options["methods"]))
    for option, name, choices in known:
        if name is not None:
            refuse_unknown(option, name, choices)
    for name in ("num_samples", "batch_size", "max_new_tokens"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]} is out of range; it must be at least 1")
    for name, values in (("--kv-budget", options["budgets"]), ("--keep-ratio", options["ratios"])):
        for value in values:
            if not 0 < value <= 1:
                raise UsageError(f"{name} {value} is out of range; it must be above 0 and at most 1")
        if values and not options["methods"] and not (name == "--kv-budget" and options["token_methods"]):
            raise UsageError(f"{name} says how a --method is to be run; name one (the artifact has its own)")
    for name in options["token_methods"]:
        refuse_unknown("token-method", name, TOKEN_METHODS)
    for value in options["token_ratios"]:
        check_fraction("--token-keep-ratio", value)
    if options["token_ratios"] and not options["token_methods"]:
        raise UsageError("--token-keep-ratio says how many image tokens stay; say which with --token-method")
    if options["token_methods"] and not (options["token_ratios"] or options["budgets"]):
        raise UsageError("--token-method says which image tokens stay; say how many with --token-keep-ratio, or with --kv-budget")
    if options["suite"] is not None and options["token_methods"]:
        raise UsageError("--suite and --token-method contradict each other; choose one")
    if options["suite"] is not None and options["methods"]:
        raise UsageError("--suite and --method contradict each other; choose one")
    if options["also"] and options["suite"] is None:
        raise UsageError("--also adds calibrations to a suite; choose one with --suite")
    if options["shard"] is not None:
        from ..journal import Shard

        if Shard.parse(options["shard"]).count == 1:
            options["shard"] = None  # one process of one
    if options["shard"] and (options["plot"] or options["write_card"] or options["as_json"]):
        raise UsageError("--shard measures a part; leave --plot, --write-card and --json to the run that puts all together")
    if options["quick"] and options["num_samples"] is not None:
        raise UsageError("--quick and --num-samples contradict each other; choose one")
    if options["suite"] is not None and options["output"] is None:
        raise UsageError("--suite writes files; say where with --output DIR")
    for name in ("resume", "plot", "shard"):
        if options[name] and options["output"] is None:
            raise UsageError(f"--{name} needs --output DIR")


def _check_names(data: str, options: dict[str, Any]) -> None:
    """Refuse unknown names at once; what they name is opened later."""
    from ..calibration_data import registry

    registry.refuse_unknown(data)
    if options["model"] is not None:
        aliases.refuse_unknown(options["model"])


def _measure(artifact: str, data: str, asks: tuple[str, ...], options: dict[str, Any]) -> tuple[list[Any], int]:
    from ..api import base_source, load_base, load_smaller
    from ..batches import end_ids, rope_index
    from ..calibration_data.registry import open_data
    from ..card import require_card
    from ..documents import Documents, usable
    from ..evaluate import Evaluator
    from ..hub import open_artifact
    from ..journal import Journal, Shard
    from ..learned import load_all
    from ..methods import Methods, distinct
    from ..models import choose_device, fingerprint
    from ..plots import plot_results, require_matplotlib
    from ..rap_evaluate import PrunedRun, StackedRun, refuse_others
    from ..runtime.backends import choose_backend
    from ..runtime.enable import enable
    from ..suite import QUICK_DOCUMENTS, batch_sizes, facts_of, read_results, run_entries, tensors_hash, write_results
    from ..token_entries import token_entries

    if options["plot"]:
        require_matplotlib()
    output, size, shard = options["output"], options["batch_size"], Shard.parse(options["shard"] or "1/1")
    if output is not None and not options["resume"] and (output / shard.journal).exists():
        raise RotateKError(f"{output / shard.journal} holds an evaluation already; pass --resume to go on with it, or another --output")
    read = open_artifact(artifact, options["revision"])
    if read.rap is not None:
        refuse_others(read, options)
    learned = load_all(options["learned"], read)
    also = [_other(other, read, artifact, options) for other in options["also"]]
    _refuse_twice([read, *also], [artifact, *options["also"]])
    if options["write_card"]:
        require_card(read)
    source = open_data(data, "evaluation", options["seed"], options["data_revision"], images=not read.geometry.text_only)
    options["max_new_tokens"] = options["max_new_tokens"] or source.max_new_tokens
    choose_backend(options["backend"], choose_device(options["device"]))
    count = QUICK_DOCUMENTS if options["quick"] else options["num_samples"] or 50
    samples = usable(source, count, read.geometry.text_only)  # before weights are loaded: a picture that does not open is said at once
    model, processor = load_base(read, model=options["model"], dtype=options["dtype"], device=options["device"])
    eos, size = end_ids(model), read.geometry.rows_at_once(size)
    items = Documents(source, samples, processor, read.geometry, eos[0], rope_index(model))
    evaluators = [Evaluator(model, processor, ask, eos, options["max_new_tokens"]) for ask in asks]
    run: Any
    if read.rap is not None:
        pruned = load_smaller(read, dtype=options["dtype"], device=options["device"])[0]
        coding = options["backend"], not options["no_fallback"]
        run = StackedRun(read, evaluators, pruned, *coding) if read.coded else PrunedRun(read, evaluators, pruned)
    else:
        run = enable(model, read, backend=options["backend"], fallback=not options["no_fallback"])
    with run as active:
        state = {name: file.state() for name, file in learned.items()}
        methods: Any = Methods(active, learned=state) if read.rap is None else active
        if options["suite"]:
            entries = methods.suite(options["suite"])
            for number, other in enumerate(also, 1):
                entries += [entry for entry in Methods(active, other, number).suite(options["suite"]) if entry.calibrated]
        else:
            named = options["methods"], options["budgets"], options["ratios"]
            if read.rap is not None:
                entries = methods.entries(*named)
            else:
                if options["token_methods"]:
                    chosen = distinct(token_entries(methods, *named, options["token_methods"], options["token_ratios"]))
                else:
                    chosen = methods.chosen(*named)
                entries = [methods.dense(), methods.compiled(), *chosen]
        same = {name: options[name] for name in ("seed", "max_new_tokens", "batch_size")}
        same |= {"backend": active.backend.name, "fallback": not options["no_fallback"]}
        if learned:
            same["learned"] = {name: tensors_hash(file.tensors) for name, file in sorted(learned.items())}
        if read.rap is not None:
            same["pruned"] = fingerprint(Path(str(read.path)))[:16]
        facts = facts_of(read, base_source(read, options["model"]), evaluators[0], source, list(samples.values()), same, also)
        if output is None:
            measured = run_entries(evaluators, entries, items, size, options["quiet"])
            _write_card(read, measured, facts, options)
            return measured, len(items)
        labels = [entry.label for entry in entries]
        with Journal(output, facts, asks, labels, batch_sizes(len(items), size), options["resume"], shard) as journal:
            try:
                measured = run_entries(evaluators, entries, items, size, options["quiet"], journal)
            except KeyboardInterrupt:
                raise RotateKError(f"interrupted; what was measured is in {journal.file}, go on with --resume") from None
        if shard.count > 1:
            return measured, len(items)
        file = write_results(output, measured, facts)
        _write_card(read, measured, facts, options)
        if options["plot"]:
            plot_results(read_results(file), output)
    return measured, len(items)


def _other(name: str, first: Any, first_name: str, options: dict[str, Any]) -> Any:
    """Another calibration of the same model, read; UsageError if it is none."""
    from dataclasses import replace

    from ..hub import open_artifact

    other = open_artifact(name)
    if reason := first.geometry.difference(other.geometry):
        raise UsageError(f"--also {name} does not belong to {first_name}: {reason}; name artifacts of one model")
    if first.base_model.get("fingerprint") != other.base_model.get("fingerprint"):
        raise UsageError(f"--also {name} was compiled for other weights than {first_name}; name artifacts of one model")
    asked = ["rival", "basis", "span", "window", "allocation", "key_bits", "value_bits", "kv_budget", "max_kl"]  # data chooses the rest
    asked += ["token_method", "token_keep_ratio", "token_budget"]
    for option in asked:
        seen, wanted = getattr(other.method, option), getattr(first.method, option)
        if seen != wanted:
            raise UsageError(f"--also {name} has {option} {seen}, {first_name} has {wanted}; only calibration data and seed may differ")
    return replace(other, method=replace(other.method, fallback_factor=0.0)) if options["no_fallback"] else other


def _refuse_twice(artifacts: list[Any], names: list[str]) -> None:
    """Refuse a calibration that is named twice: it would count as two, of which the intervals know nothing new."""
    from ..suite import tensors_hash

    seen: dict[str, str] = {}
    for one, name in zip(artifacts, names, strict=True):
        same = tensors_hash(one.tensors)  # the rest of them was compared
        if same in seen:
            raise UsageError(f"--also {name} is the same calibration as {seen[same]}; name one of other data or of another --seed")
        seen[same] = name


def _write_card(artifact: Any, measured: list[Any], facts: dict[str, Any], options: dict[str, Any]) -> None:
    from ..card import base_name, write_measured

    if options["write_card"]:
        write_measured(artifact.path, base_name(artifact)[1], [m.to_json() for m in measured], facts)


def _name(row: dict[str, Any]) -> str:
    alone = row["method"] == "artifact" or not row["setting"]
    return row["method"] if alone else f"{row['method']} ({row['setting']})"


def _print_remarks(rows: list[dict[str, Any]]) -> None:
    """What the model itself gets wrong, where heads kept more than planned, how ours stands beside the best rivals of its budget."""
    if any(row["method"] == "dense" and row["score"] < POOR for row in rows):
        click.echo(f"uncompressed, the model hardly answers as expected here ({rows[0]['metric']} below {POOR:g}); {SAYS_LITTLE}")
    for row in rows:
        if row["fallback_heads"]:
            click.echo(f"{_name(row)} kept more than planned in {row['fallback_heads']} (document, head, segment) places")
    for row in rows:
        found = row["against"] or {}
        prefix, words = (
            ("rival", "the best rival within its bytes") if found.get("rival") else ("above", "the best rival, which needs more")
        )
        if found.get(f"{prefix}_ratio") is not None:
            low, high = ("inf" if end is None else f"{end:.2g}" for end in (found[f"{prefix}_low"], found[f"{prefix}_high"]))
            beside = f"{found[prefix]} at {found[f'{prefix}_span']:.3f} of the span, KL {found[f'{prefix}_kl']:.2e}"
            click.echo(f"{_name(row)}: {found[f'{prefix}_ratio']:.2g} [{low}, {high}] of the KL of {words}: {beside}")


def _print(rows: list[dict[str, Any]]) -> None:
    named = [(_name(row), row) for row in rows]
    width = max(10, *(len(name) for name, _ in named))
    metric = rows[0]["metric"]  # the data set's own; those of every row are always shown
    wide = max(7, len(metric)) if metric not in ("exact_match", "anls") else 0
    own = [f" {row['score']:{wide}.3f}" if wide else "" for row in rows]
    title = f" {metric:>{wide}}" if wide else ""
    sizes = f"{'KV bytes':>12} {'dense KV':>12} {'coded span':>12} {'dense span':>12} {'ratio':>6}"
    click.echo(f"{'method':{width}}{title} {'exact':>7} {'ANLS':>7} {'KL/token':>10} {sizes}")
    for (name, row), score in zip(named, own, strict=True):
        span, dense = row["span_bytes"], row["span_bytes_dense"]
        coded = f"{span:12,.0f} {dense:12,.0f} {span / dense:6.3f}" if dense else f"{'-':>12} {'-':>12} {'-':>6}"
        click.echo(
            f"{name:{width}}{score} {row['exact_match']:7.3f} {row['anls']:7.3f} {row['kl']:10.2e} {row['kv_bytes']:12,.0f} "
            f"{row['kv_bytes_dense']:12,.0f} {coded}"
        )
