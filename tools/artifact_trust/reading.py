"""Sound artifacts to damage, and what must be true of whatever the reader made of a damaged one."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load, save

from rotatek_compile.artifact import Artifact, Method, read_artifact, write_artifact
from rotatek_compile.carried_files import check_carried_files
from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.inspection import describe, summary
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import SIDES
from rotatek_compile.report_page import page
from rotatek_compile.runtime.prepared import PreparedArtifact

HEADS, DIM, LEVELS = 2, 16, (Slabs(), Slabs(nibble=16))
STEPS = (8, 8, 16)  # of native, 8-bit and 4-bit directions
LONGEST = 1200  # characters of a refusal
MARKUP = ("<script>alert", "<img src=x")  # in VALUES of text_mutations.py


def sound_artifacts() -> list[dict[str, bytes]]:
    """Files of six tiny artifacts: ours with each span, without knock-outs, by bytes, of the first format, and two rivals."""
    layer = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=HEADS, head_dim=DIM)
    sliding = LayerGeometry(layer_type="sliding_attention", query_heads=4, kv_heads=HEADS, head_dim=DIM)
    geometry = Geometry(model_type="llava_next", layers=(layer, sliding, layer), visual_token_ids=(5,))
    methods = [
        Method(levels=LEVELS, keep_ratio=0.5),
        Method(levels=LEVELS, keep_ratio=0.5, span="all", basis="pca"),
        Method(levels=LEVELS, allocation="uniform"),
        Method(rival="head-drop", keep_ratio=0.5),
        Method(rival="int4", keep_ratio=1.0, kv_budget=0.5),
        Method(levels=LEVELS, keep_ratio=0.5, key_bits="auto", value_bits="auto", kv_budget=0.25, max_kl=0.01, usual_deviation=2.0),
    ]
    files = [_files(geometry, method, number) for number, method in enumerate(methods)]
    return [*files, first_format(files[0])]


def first_format(files: dict[str, bytes]) -> dict[str, bytes]:
    """An artifact as the first version wrote it: native ranks of the Keys, sensitivities of ranks."""
    tensors, config = load(files["rotatek.safetensors"]), json.loads(files["rotatek_config.json"])
    for name in list(tensors):
        if name.endswith(("value_plan", "value_sensitivity")):
            del tensors[name]
        elif name.endswith("key_plan"):
            tensors[name.replace("key_plan", "key_rank")] = tensors.pop(name)[:, 0].contiguous()
        elif name.endswith("key_sensitivity"):
            tensors[name.replace("key_sensitivity", "sensitivity")] = tensors.pop(name)
    content = save(tensors, metadata={"format": "pt"})
    config["format_version"], config["rotatek"]["levels"] = 1, [0, 8]
    del config["rotatek"]["max_kl"]
    config["files"]["rotatek.safetensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    return files | {"rotatek.safetensors": content, "rotatek_config.json": json.dumps(config).encode()}


def _files(geometry: Geometry, method: Method, number: int) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for i in geometry.compressible:
        if number != 2:
            tensors[f"layers.{i}.knockout"] = torch.rand(HEADS, generator=generator)
        if method.rival is not None:
            continue
        tensors[f"layers.{i}.key_plan"] = torch.tensor([[8, 0, 0], [0, 0, 0]], dtype=torch.int32)
        tensors[f"layers.{i}.value_plan"] = torch.tensor([[DIM, 0, 0], [0, 0, 16]], dtype=torch.int32)
        for side in SIDES:
            tensors[f"layers.{i}.{side}_sensitivity"] = torch.rand(HEADS, len(LEVELS), generator=generator)
        for prefix in (f"layers.{i}.{kind}.{side}" for kind in method.kinds for side in ("key", "value")):
            tensors[f"{prefix}_mean"] = torch.randn(HEADS, DIM, generator=generator)
            tensors[f"{prefix}_spectrum"] = torch.rand(HEADS, DIM, generator=generator).sort(descending=True).values
            tensors[f"{prefix}_encode"] = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q
            if method.usual_deviation is not None:
                tensors |= {f"{prefix}_{name}": 1 + torch.rand(HEADS, DIM, generator=generator) for name in ("tail_ratio", "code_ratio")}
                tensors |= {f"{prefix}_angle": 1 + torch.rand(HEADS, 2, generator=generator)} if prefix.endswith(".visual.value") else {}
    base = [
        {"id": "org/name", "revision": "0" * 40, "fingerprint": None},
        {"id": "/models/name", "revision": None, "fingerprint": "0" * 64},
        {"id": "tiny-llava-next", "revision": None, "fingerprint": "0" * 64},
    ][number % 3]
    heads = [{"key": [8, 0, 0], "value": [DIM, 0, 0], "key_energy_kept": 0.5, "key_kl_when_cut": [0.1, 0.0]} for _ in range(HEADS)]
    report = {"plan_kl": 1e-5, "seconds": {"total": 1.5}, "layers": [{"layer": i, "heads": heads} for i in geometry.compressible]}
    calibration = {"data": "forms", "revision": None, "split": "calibration", "num_samples": 4, "seed": 0, "samples": "0" * 64}
    artifact = Artifact(geometry, method, tensors, base, calibration, report)
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(artifact, Path(folder), "# card\n")
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    processor = {"processor_class": "LlavaNextProcessor", "image_processor": {"size": {"shortest_edge": 160}}}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "added_tokens_decoder": {"0": {"content": "<pad>"}}}
    return files | {"processor_config.json": json.dumps(processor).encode(), "tokenizer_config.json": json.dumps(tokenizer).encode()}


def read_and_use(directory: Path) -> tuple[Artifact | None, str | None]:
    """Everything a command does with an artifact short of loading its base: (artifact, None) or (None, the refusal)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            artifact = read_artifact(directory)
            check_carried_files(directory)
            prepared = PreparedArtifact(artifact)
            json.dumps(summary(artifact), allow_nan=False)
            describe(artifact).encode()
            markup = page([artifact])
            assert not any(text in markup for text in MARKUP), "text of the artifact became markup of the page"
            for i in artifact.geometry.compressible:
                if artifact.method.rival is None:
                    prepared.layer(i, torch.device("cpu"), torch.float32)
        except RotateKError as error:
            return None, str(error)
    return artifact, None


def wrong_refusal(words: str) -> str | None:
    """What is wrong with the words of a refusal: they must be one printable sentence that says what to do."""
    if not words.isprintable():
        return "a refusal that cannot be printed"
    if len(words) > LONGEST:
        return f"a refusal of {len(words)} characters"
    return None


def wrong_artifact(artifact: Artifact, directory: Path) -> str | None:
    """What is wrong with an artifact that was accepted, found without the reader's own checks."""
    data = (directory / "rotatek.safetensors").read_bytes()
    recorded = json.loads((directory / "rotatek_config.json").read_bytes())["files"]["rotatek.safetensors"]["sha256"]
    if hashlib.sha256(data).hexdigest() != recorded:
        return "accepted tensors with another checksum"
    for i, layer in enumerate(artifact.geometry.layers):
        if not (0 < layer.kv_heads <= layer.query_heads <= 4096 and 0 < layer.head_dim <= 1024):
            return f"accepted layer {i} of {layer}"
    numbers = (artifact.method.window, artifact.method.prior_tokens, artifact.geometry.position_axes, *artifact.geometry.visual_token_ids)
    if any(type(number) is not int or not 0 <= number <= 1 << 30 for number in numbers):
        return f"accepted the numbers {numbers!r:.200}"
    texts = [artifact.geometry.model_type, *artifact.base_model.values(), *artifact.calibration.values()]
    if unprintable := [text for text in texts if isinstance(text, str) and not text.isprintable()]:
        return f"accepted the text {unprintable[0]!r:.200}"
    if ".." in artifact.base_model["id"]:
        return f"accepted the base {artifact.base_model['id']!r:.200}"
    for name, tensor in artifact.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"accepted {name}, which is not finite"
        if name.endswith(("spectrum", "knockout")) and tensor.numel() and float(tensor.min()) < 0:
            return f"accepted {name}, which is negative"
        if name.endswith("_ratio") and tensor.numel() and not 1 <= float(tensor.min()) <= float(tensor.max()) <= 1e9:
            return f"accepted {name}, which is out of range"
        if name.endswith("_angle") and tensor.numel() and not 0 <= float(tensor.min()) <= float(tensor.max()) <= 90:
            return f"accepted {name}, which is no angle"
    for i, plan in artifact.plan().items():
        dim, heads = artifact.geometry.layers[i].head_dim, artifact.geometry.layers[i].kv_heads
        for slabs in (slabs for head in plan for slabs in head):
            if any(part % step or part < 0 for part, step in zip(slabs, STEPS, strict=True)) or sum(slabs) > dim:
                return f"accepted the slabs {tuple(slabs)}"
        if len(plan) != heads:
            return f"accepted a plan of {len(plan)} heads"
        for kind in artifact.method.kinds:
            encode = artifact.tensors[f"layers.{i}.{kind}.key_encode"].double()
            decode, singular = torch.linalg.inv_ex(encode)
            error = (decode @ encode - torch.eye(dim, dtype=torch.float64)).abs().max()
            if encode.shape != (heads, dim, dim) or bool(singular.any()) or not float(error) < 1e-6:
                return f"accepted a basis of layer {i} that has no inverse"
    return None
