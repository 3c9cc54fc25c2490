"""A small random model and a byte-level tokenizer for the tests of infer."""

import contextlib
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from infer.engine.settings import Hidden
from lora import LoRAConfig, add_lora, save_adapter
from model import KVCache, ModelConfig, Tokenizer, Transformer
from model.attention import Scores
from model.support.init import init_weights

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, None),
    max_position_embeddings=4096,
    eos_token_id=(),
)


def tiny_model(seed: int = 0, windows=(None, None), dtype=torch.float64, **changes) -> Transformer:
    """Random weights, large enough that logits differ and greedy text does not stand still."""
    model = init_weights(Transformer(replace(CONFIG, windows=windows, **changes)), seed).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
            elif name.endswith("bias"):
                parameter.copy_(torch.arange(len(parameter)).cos() / 2)
    return model.requires_grad_(False).eval()


def write_tokenizer(folder: Path) -> Path:
    """Bytes, a few merges, an end token: tokenizer.json in a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("c", "m"), ("Ġ", "c"), ("e", "r"), ("Ġc", "m"), ("Ġ", "not"[0]), ("i", "n")]
    pieces = [*letters, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Fast(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def tiny_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tokenizer(folder))


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A whole model's folder, as a user would give it."""
    tiny_model(seed, dtype=torch.float32, **changes).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@contextlib.contextmanager
def unseen(model: Transformer, hidden: Hidden | None):
    """While this lasts, the plain model's queries from `after` on do not see the hidden keys: the specification."""

    def hide(module, arguments, score_BHTS):
        before = score_BHTS.shape[3] - score_BHTS.shape[2]  # keys in the cache
        late = slice(max(0, hidden.after - before), None)
        score_BHTS[:, :, late, hidden.first : hidden.stop] = torch.finfo(score_BHTS.dtype).min

    modules = [module for module in model.modules() if isinstance(module, Scores)] if hidden else []
    handles = [module.register_forward_hook(hide) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def plain_greedy(model: Transformer, ids: list[int], count: int, stop=()) -> tuple[list[int], list[float]]:
    """The specification: one token at a time through model.Transformer and its cache."""
    cache, fed, tokens, logprobs = KVCache(model.config), list(ids), [], []
    while len(tokens) < count:
        logits_V = model(torch.tensor([fed]), cache=cache)[0, -1]
        token = int(logits_V.argmax())
        tokens.append(token)
        logprobs.append(float(logits_V.detach().log_softmax(-1)[token]))
        fed = [token]
        if token in stop:
            break
    return tokens, logprobs


def write_adapter(folder: Path, weights: Path) -> Path:
    """An adapter of the model in `weights` that changes its answers."""
    model = add_lora(Transformer.from_pretrained(weights), LoRAConfig(r=2, target_modules=("q_proj",)), seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.fill_(0.3)
    save_adapter(model, folder)
    return folder


@contextlib.contextmanager
def tokens_read(model: Transformer) -> Iterator[list[int]]:
    """How many tokens each forward pass of a model computes, while it lasts."""
    read: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, given, out: read.append(given[0].numel()))
    yield read
    hook.remove()


def make_mistake(monkeypatch, owner, name: str, right: str, wrong: str) -> None:
    """Replaces a function of a module or class by itself with `right`, which its source holds once, made `wrong`."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(right) == 1
    scope = dict(vars(inspect.getmodule(owner)))
    exec(source.replace(right, wrong), scope)
    monkeypatch.setattr(owner, name, scope[name])
