"""RotateK: compile a vision-language model's KV cache and decode straight from the compact form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import disable, enabled, load
    from .ask_many import compress
    from .compile_options import CompileOptions
    from .compiler import compile_artifact
    from .errors import ArtifactError, RotateKError, UsageError
    from .runtime.document import Document, load_document
    from .runtime.enable import enable
    from .runtime.saved import load_cache

_PLACES = {
    "load": "api",
    "enabled": "api",
    "disable": "api",
    "enable": "runtime.enable",
    "compress": "ask_many",
    "Document": "runtime.document",
    "load_document": "runtime.document",
    "load_cache": "runtime.saved",
    "CompileOptions": "compile_options",
    "compile_artifact": "compiler",
    "RotateKError": "errors",
    "UsageError": "errors",
    "ArtifactError": "errors",
}
__all__ = [
    "ArtifactError", "CompileOptions", "Document", "RotateKError", "UsageError", "__version__",
    "compile_artifact", "compress", "disable", "enable", "enabled", "load", "load_cache", "load_document",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # looked up on first use: importing the package must not import torch
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
