"""The architecture, its weights and its tokenizer."""

from model.cache import KVCache
from model.config import ModelConfig
from model.mask import Layout
from model.text.tokenizer import Tokenizer
from model.transformer import Transformer

__all__ = ["KVCache", "Layout", "ModelConfig", "Tokenizer", "Transformer"]
