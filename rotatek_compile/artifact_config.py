"""rotatek_config.json: the method an artifact stands for, and the checks of its sections (DESIGN.md §5).

Every number that later decides how much is allocated has a bound here, and every text that is looked up elsewhere a form.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from .errors import ArtifactError
from .geometry import Geometry
from .kernels.slabs import UNIT, Slabs, check_slabs
from .names import ALLOCATIONS, BASES, BITS, RAP, SPANS, TOKEN_METHODS
from .untrusted import shown

FORMAT_VERSION = 2
RANK_STEP = UNIT
AGAIN = "compile the artifact again"

# Far above any model, far below what would hurt.
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1024, 4096, 1024
MAX_TOKENS = 1 << 30
MAX_LIST = 64  # sensitivity levels, token ids
MAX_TEXT = 500  # characters of an id, a path or a name

KNOWN = {"format_version", "tool", "base_model", "geometry", "rotatek", "rap", "calibration", "libraries", "files"}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What the runtime must know beyond tensors; the section `rotatek` of the config."""

    basis: str = "two-sided"
    span: str = "visual"
    window: int = 128  # newest text tokens kept raw
    keep_ratio: float = 0.25  # fraction of Key directions kept, mean over heads; what the plan came to where another budget set it
    allocation: str = "allocated"
    key_bits: str = "native"  # precision of the Keys that are kept: one for all of them, or auto for several
    value_bits: str = "native"  # native Values are raw; another precision means codes in a basis
    prior_tokens: int = 256  # n0 of DESIGN.md §4.6: how many tokens the calibrated covariance is worth
    fallback_factor: float = 8.0  # a head that discards more than this many times what is usual (usual.py) keeps more; 0 turns it off
    usual_deviation: float | None = None  # images that deviate more from the calibration documents are said to; None: not known
    image_tokens: int = 512  # of the short ones among the calibration images: a budget of bytes pays for their own means and scales
    escape_ratio: float = 0.0  # share of a segment's tokens that stay raw in every head: those its codes would lose most of
    levels: tuple[Slabs, ...] = ()  # at which sensitivities were measured, the same for Keys and Values
    rival: str | None = None  # another method than ours, by its name in runtime/rivals/registry.py
    kv_budget: float | None = None  # share of the dense bytes, where it was set by bytes and not by keep_ratio
    token_keep_ratio: float = 1.0  # share of each image's tokens that stay in the cache; kv_budget is a share of the bytes of these alone
    token_method: str | None = None  # the score that chooses them (runtime/token_selection.py); None where all stay
    token_budget: float | None = None  # share of the dense bytes of all tokens that were read, where the budget was set so
    max_kl: float | None = None  # nats per answer token that the budget was chosen for
    text_only: bool = False  # the model reads no images, so only text is coded

    @property
    def kinds(self) -> tuple[str, ...]:
        """Token kinds that are coded."""
        if self.text_only:
            return ("text",)
        return ("visual",) if self.span == "visual" else ("visual", "text")

    @property
    def words(self) -> str:
        """Method and setting for people."""
        if self.token_method is None:
            return self._coded_words()
        whole = f" (KV budget {self.token_budget:.4g} of all tokens)" if self.token_budget is not None else ""
        return f"{self.token_keep_ratio:.4g} of the image tokens by {self.token_method}{whole}, of these: {self._coded_words()}"

    def _coded_words(self) -> str:
        if self.rival is None:
            return self._own_words()
        if self.rival == RAP:
            return f"RAP, keep ratio {self.keep_ratio:g}"
        if self.kv_budget is not None:
            return f"rival method {self.rival}, KV budget {self.kv_budget}"
        return f"rival method {self.rival}" + (f", keep ratio {self.keep_ratio}" if self.keep_ratio < 1 else "")

    def _own_words(self) -> str:
        escapes = [f"{self.escape_ratio:.4g} of the tokens raw"] if self.escape_ratio else []
        if self.kv_budget is not None:
            wanted = f" for at most {self.max_kl:g} nats" if self.max_kl is not None else ""
            spent = f"basis {self.basis}, {self.allocation} directions and bits, KV budget {self.kv_budget:.4g}{wanted}"
            return ", ".join([spent, *escapes])
        precise = [f"{side} at {bits} bits" for side, bits in (("Keys", self.key_bits), ("Values", self.value_bits)) if bits != "native"]
        return ", ".join([f"basis {self.basis}", f"{self.allocation} ranks", f"keep ratio {self.keep_ratio}", *precise, *escapes])


def check_sections(config: dict[str, Any], where: str) -> None:
    """Version, unknown keys (a warning) and the sections that are only handed on.

    Args:
        where: names the file in messages; so in the functions below.

    Raises:
        ArtifactError: one sentence naming the key, the value seen and what to do.
    """
    version = config.get("format_version")
    if type(version) is not int:
        raise ArtifactError(f"{where}: format_version is {shown(version)}, not a whole number; {AGAIN}")
    if version < 1:
        raise ArtifactError(f"{where}: format_version is {version}, the first one is 1; {AGAIN}")
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{where}: format_version {version} is newer than {FORMAT_VERSION}; upgrade rotatek-compile")
    _warn_unknown(set(config) - KNOWN, where)
    for section in ("base_model", "calibration", "files"):
        if not isinstance(config.get(section), dict):
            raise ArtifactError(f"{where}: section {section} is missing; {AGAIN}")
    if not isinstance(config.get("libraries", {}), dict):
        raise ArtifactError(f"{where}: section libraries is {shown(config['libraries'])}, expected an object; {AGAIN}")


def check_base_model(base: dict[str, Any], where: str) -> None:
    """The base is the one thing that an artifact has loaded: a repository of the Hub by its id, or a checkpoint of this machine.

    With a fingerprint it was compiled from files: an absolute path, the alias of a bundled model, or (pushed to the Hub) a bare name that
    nothing is loaded by. Without one the id must be a Hub id,
    so that no path can pass for one.

    Raises:
        ArtifactError: as `check_sections`.
    """
    for key, kinds in (("id", (str,)), ("revision", (str, type(None))), ("fingerprint", (str, type(None)))):
        seen = base.get(key)
        if not isinstance(seen, kinds) or (isinstance(seen, str) and len(seen) > MAX_TEXT):
            raise ArtifactError(f"{where}: base_model.{key} is {shown(seen)}, expected text; {AGAIN}")
    name, revision = base["id"], base.get("revision")
    path = PurePath(name)
    if base.get("fingerprint") is None:
        if not _HUB_ID.fullmatch(name) or ".." in name:
            raise ArtifactError(f"{where}: base_model.id is {shown(name)}, which is no Hub id like org/name; {AGAIN}, or pass --model")
    elif path.is_absolute():
        if ".." in path.parts:
            raise ArtifactError(f"{where}: base_model.id is {shown(name)}, a path that goes up again; {AGAIN}")
    elif not name.strip(".") or "/" in name or "\\" in name:
        raise ArtifactError(f"{where}: base_model.id is {shown(name)}, expected an absolute path or the name of a checkpoint; {AGAIN}")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or revision.startswith("refs/")):
        # refs/pr/N is what anybody may propose to somebody else's repository
        raise ArtifactError(f"{where}: base_model.revision is {shown(revision)}, which is no commit, branch or tag; {AGAIN}")


def read_geometry(data: Any, where: str) -> Geometry:
    """Section geometry.

    Raises:
        ArtifactError: as `check_sections`.
    """
    where = f"{where}: section geometry"
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is missing; {AGAIN}")
    layers, ids, kind = data.get("layers"), data.get("visual_token_ids"), data.get("model_type")
    if not isinstance(kind, str) or len(kind) > MAX_TEXT:
        raise ArtifactError(f"{where}: model_type is {shown(kind)}, expected a name; {AGAIN}")
    if not isinstance(ids, list) or len(ids) > MAX_LIST or not all(_whole(i, 0, MAX_TOKENS) for i in ids):
        raise ArtifactError(f"{where}: visual_token_ids is {shown(ids)}, expected a list of token ids; {AGAIN}")
    if not _whole(axes := data.get("position_axes", 1), 1, 16):
        raise ArtifactError(f"{where}: position_axes is {shown(axes)}, expected 1 to 16; {AGAIN}")
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise ArtifactError(f"{where}: layers is {shown(layers)}, expected a list of 1 to {MAX_LAYERS}; {AGAIN}")
    for index, layer in enumerate(layers):
        _check_layer(layer, f"{where}: layer {index}")
    geometry = Geometry.from_json(data)
    if not geometry.compressible:
        raise ArtifactError(f"{where} lists no full_attention layer; {AGAIN}")
    for index in geometry.compressible:
        if (dim := geometry.layers[index].head_dim) % RANK_STEP:
            raise ArtifactError(f"{where}: layer {index} has head_dim {dim}, which is no multiple of {RANK_STEP}; {AGAIN}")
    return geometry


def _check_layer(layer: Any, where: str) -> None:
    if not isinstance(layer, dict):
        raise ArtifactError(f"{where} is {shown(layer)}, expected an object; {AGAIN}")
    if not isinstance(kind := layer.get("layer_type"), str) or len(kind) > MAX_TEXT:
        raise ArtifactError(f"{where} has layer_type {shown(kind)}, expected a name; {AGAIN}")
    for name, most in (("query_heads", MAX_HEADS), ("kv_heads", MAX_HEADS), ("head_dim", MAX_HEAD_DIM)):
        if not _whole(seen := layer.get(name), 1, most):
            raise ArtifactError(f"{where} has {name} {shown(seen)}, expected 1 to {most}; {AGAIN}")
    if layer["query_heads"] % layer["kv_heads"]:
        heads = f"{layer['query_heads']} query heads and {layer['kv_heads']} KV heads"
        raise ArtifactError(f"{where} has {heads}, which do not divide; {AGAIN}")


def read_method(data: Any, where: str, version: int = FORMAT_VERSION) -> Method:
    """Section rotatek; the first format names a level by its native directions alone.

    Raises:
        ArtifactError: as `check_sections`.
    """
    where = f"{where}: section rotatek"
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is missing; {AGAIN}")
    names = {f.name for f in fields(Method)}
    _warn_unknown(set(data) - names, where)
    values = {k: v for k, v in data.items() if k in names}
    levels = values.get("levels", [])
    if not isinstance(levels, list) or len(levels) > MAX_LIST or not all(_level(level, version) for level in levels):
        kind = "ranks" if version == 1 else "[native, 8-bit, 4-bit] directions"
        raise ArtifactError(f"{where}: levels is {shown(levels)}, expected a list of {kind}; {AGAIN}")
    method = Method(**values | {"levels": tuple(Slabs(level) if version == 1 else Slabs(*level) for level in levels)})
    checks = {
        "basis": method.basis in BASES,
        "span": method.span in SPANS,
        "allocation": method.allocation in ALLOCATIONS,
        "key_bits": method.key_bits in BITS,
        "value_bits": method.value_bits in BITS,
        "window": _whole(method.window, 1, MAX_TOKENS),
        "keep_ratio": _number(method.keep_ratio) and 0 <= method.keep_ratio <= 1,
        "prior_tokens": _whole(method.prior_tokens, 0, MAX_TOKENS),
        "fallback_factor": _number(method.fallback_factor) and 0 <= method.fallback_factor <= 1e9,
        "usual_deviation": method.usual_deviation is None or (_number(method.usual_deviation) and 0 < method.usual_deviation <= 1e9),
        "image_tokens": _whole(method.image_tokens, 1, MAX_TOKENS),
        "escape_ratio": _number(method.escape_ratio) and 0 <= method.escape_ratio <= 0.25,
        "rival": method.rival is None or (isinstance(method.rival, str) and len(method.rival) <= MAX_TEXT),
        "text_only": method.text_only is False or (method.text_only is True and method.span == "all" and method.rival is None),
        "token_method": method.token_method is None or method.token_method in TOKEN_METHODS,
        "token_keep_ratio": _number(method.token_keep_ratio) and 0 < method.token_keep_ratio <= 1 and _selects(method),
        "token_budget": method.token_budget is None or (_number(method.token_budget) and 0 < method.token_budget <= 1),
        "kv_budget": method.kv_budget is None or (_number(method.kv_budget) and 0 < method.kv_budget <= 1),
        "max_kl": method.max_kl is None or (_number(method.max_kl) and 0 <= method.max_kl <= 1e9),
    }
    for name, good in checks.items():
        if not good:
            raise ArtifactError(f"{where}: {name} is {shown(getattr(method, name))}, which this version cannot run; {AGAIN}")
    return method


def _selects(method: Method) -> bool:
    """Whether ratio and method of the token selection fit each other: both or none, and images alone are coded."""
    return (method.token_method is not None and method.span == "visual") if method.token_keep_ratio < 1 else method.token_method is None


def _warn_unknown(keys: set[str], where: str) -> None:
    if keys:
        few = sorted(keys)[:8]
        more = f" and {len(keys) - len(few)} more" if len(keys) > len(few) else ""
        warnings.warn(f"{where}: ignoring unknown keys {', '.join(key[:60] for key in few)}{more}", stacklevel=4)


def _level(value: Any, version: int) -> bool:
    """Whether a level is a rank (first format), or native, 8-bit and 4-bit directions that a head could keep."""
    if version == 1:
        return _whole(value, 0, MAX_HEAD_DIM) and value % UNIT == 0
    if not isinstance(value, list) or len(value) != 3 or not all(_whole(part, 0, MAX_HEAD_DIM) for part in value):
        return False
    try:
        check_slabs(Slabs(*value), MAX_HEAD_DIM)
    except ValueError:
        return False
    return True


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # True is no number


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
