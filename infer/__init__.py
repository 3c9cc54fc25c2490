"""Prompts, generation, extraction and recording. The public names are imported on first use: they need torch."""

from importlib import import_module
from typing import Any

PLACES = {
    "Extractor": "infer.extract.extractor",
    "Generation": "infer.engine.settings",
    "Generator": "infer.engine.generate",
    "Settings": "infer.engine.settings",
    "patch": "infer.inspect.recording",
    "record": "infer.inspect.recording",
}
__all__ = ["Extractor", "Generation", "Generator", "Settings", "patch", "record"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'infer' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
