"""The architecture, its weights and its tokenizer. Names are imported on first use, because they import torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.cache import KVCache
    from model.config import ModelConfig
    from model.mask import Layout
    from model.text.tokenizer import Tokenizer
    from model.transformer import Transformer

PLACES = {
    "KVCache": "model.cache",
    "Layout": "model.mask",
    "ModelConfig": "model.config",
    "Tokenizer": "model.text.tokenizer",
    "Transformer": "model.transformer",
}
__all__ = ["KVCache", "Layout", "ModelConfig", "Tokenizer", "Transformer"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
