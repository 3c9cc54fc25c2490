"""Train a small dense retriever on notes alone, without labels, by Contriever's recipe (Izacard et al., 2021):

    python -m train.contrastive --notes train.jsonl pretrain.jsonl --out ENCODER
    python -m infer.retrieval.index --encoder contriever --weights ENCODER --notes train.jsonl --out INDEX

Two random crops of a text are a pair; the other pairs of the batch are what it must be told from (InfoNCE, in both
directions). One thing differs: the two crops come from any two notes of one patient, where a patient has several.
Crops of one note share its style, and a retriever of styles is what they make; a patient's notes share the disease.

The encoder is a BERT of 2 layers and width 128 from random weights (infer/retrieval/bert.py) over a WordPiece
vocabulary of the notes, saved in the public files' form: config.json, model.safetensors, tokenizer.json.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from infer.retrieval.bert import Bert
from infer.retrieval.encoder import pad, pool
from model.checkpoints.safetensors import write_safetensors
from model.support.cli import UserError, run
from model.support.files import atomic_folder, read_json, read_jsonl, write_json, write_text
from model.support.lock import output

SHORTEST = 32  # word pieces: a shorter text has no two crops worth telling apart
CROP = (0.2, 0.6)  # the share of a text that a crop holds
MOST = 126  # word pieces of a crop, so that with [CLS] and [SEP] it takes 128


@dataclass(frozen=True)
class Options:
    """Train a small encoder of notes."""

    notes: tuple[Path, ...]
    """JSON lines with `text` (and `patient`, where known)."""
    out: Path
    """The encoder's folder; load it as kind contriever."""
    overwrite: bool = False
    """Replace an encoder that is there."""
    steps: int = 400
    """Optimizer steps."""
    batch: int = 64
    """Pairs a step; each has the others as its negatives."""
    vocab: int = 4096
    """Word pieces."""
    width: int = 128
    """The vectors' length; four times as much in the feed-forward blocks."""
    layers: int = 2
    """Blocks."""
    learning_rate: float = 2e-3
    """AdamW's peak."""
    temperature: float = 5.0
    """What dot products are divided by; at width 128 much like Contriever's 0.05 of a cosine."""
    seed: int = 0
    """Weights, pairs and crops."""

    def __post_init__(self) -> None:
        for name in ("steps", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: at least 1")
        if self.batch < 2:
            raise UserError(f"--batch {self.batch}: at least 2, because a pair is told from the others of its batch")
        if self.width < 32 or self.width % 32:
            raise UserError(f"--width {self.width}: a multiple of 32 (the size of an attention head)")
        if self.vocab < 200:
            raise UserError(f"--vocab {self.vocab}: at least 200 word pieces")


def read_texts(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(texts, whose they are): a record without a patient is its own."""
    texts, owners = [], []
    for file in files:
        for number, record in read_jsonl(file, ("text",)):
            if not isinstance(record["text"], str):
                raise UserError(f"{file}:{number}: 'text' is not text")
            texts.append(record["text"])
            owners.append(str(record.get("patient") or f"{file}:{number}"))
    return texts, owners


def word_pieces(texts: Sequence[str], vocab: int) -> Tokenizer:
    """A WordPiece tokenizer, lower case, as BERT's: single letters, the commonest words, and in the last quarter the
    beginnings and endings that spare the other words most pieces. (The library's own trainer breaks ties by chance.)
    """
    made = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(
        word for text in texts
        for word, _ in made._tokenizer.pre_tokenizer.pre_tokenize_str(made._tokenizer.normalizer.normalize_str(text))
    )  # fmt: skip
    letters = sorted({letter for word in counts for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    whole = max(0, vocab - len(pieces)) * 3 // 4
    spared: Counter[str] = Counter()
    for word in words[whole:]:
        for cut in range(2, len(word) - 1):
            spared[word[:cut]] += counts[word] * (cut - 1)
            spared["##" + word[cut:]] += counts[word] * (len(word) - cut - 1)
    pieces += words[:whole]
    rest = sorted(spared.keys() - set(pieces), key=lambda piece: (-spared[piece], piece))
    pieces += rest[: max(0, vocab - len(pieces))]
    return BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}, lowercase=True)._tokenizer


class Pairs:
    """Batches of pairs of crops; every pair of a batch is of another patient."""

    def __init__(self, texts: Sequence[str], owners: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        ids: dict[str, list[list[int]]] = {}
        for text, owner in zip(texts, owners, strict=True):
            found = tokenizer.encode(text, add_special_tokens=False).ids
            if len(found) >= SHORTEST:
                ids.setdefault(owner, []).append(found)
        self.notes = list(ids.values())
        first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        assert first is not None and last is not None, "a WordPiece vocabulary has both"
        self.first, self.last = first, last
        self.dice = np.random.default_rng(seed)

    def crop(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A random stretch of a text between [CLS] and [SEP], with its segment ids."""
        size = min(MOST, max(8, round(len(ids) * self.dice.uniform(*CROP))))
        start = int(self.dice.integers(0, len(ids) - size + 1))
        inner = [self.first, *ids[start : start + size], self.last]
        return inner, [0] * len(inner)

    def batch(self, size: int) -> tuple[list, list]:
        """Two crops for each of `size` patients: from two of the notes, or twice from the only one."""
        a, b = [], []
        for patient in self.dice.choice(len(self.notes), size, replace=False):
            held = self.notes[patient]
            one, other = self.dice.choice(len(held), 2, replace=False) if len(held) > 1 else (0, 0)
            a.append(self.crop(held[one]))
            b.append(self.crop(held[other]))
        return a, b


def encode(model: Bert, rows: list) -> Tensor:
    tokens_BT, mask_BT, types_BT = pad(rows)
    return pool(model(tokens_BT, mask_BT, types_BT), mask_BT, "mean")


def contrast(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """InfoNCE both ways: row i of `a` belongs to row i of `b`, all other rows are its negatives."""
    scores_BB = a_BD @ b_BD.T / temperature
    own_B = torch.arange(len(scores_BB))
    return (F.cross_entropy(scores_BB, own_B) + F.cross_entropy(scores_BB.T, own_B)) / 2


def new_model(config: dict[str, Any], seed: int) -> Bert:
    """BERT's start: normal(0, 0.02), biases 0; positions 0 too, so that those which no crop reaches add nothing."""
    torch.manual_seed(seed)
    model = Bert(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.zeros_(parameter) if parameter.dim() < 2 else torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    return model


def train(options: Options) -> float:
    """Train and save the encoder; returns the mean loss of the last tenth of the steps.

    Raises UserError where the notes are fewer than a batch needs.
    """
    texts, owners = read_texts(options.notes)
    tokenizer = word_pieces(texts, options.vocab)
    pairs = Pairs(texts, owners, tokenizer, options.seed)
    if len(pairs.notes) < options.batch:
        raise UserError(
            f"--batch {options.batch}: only {len(pairs.notes)} patients have a text of {SHORTEST} word pieces; "
            "give more notes or a smaller --batch"
        )
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": options.width, "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 32, "intermediate_size": 4 * options.width, "type_vocab_size": 2,
        "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    model = new_model(config, options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup, losses = max(1, options.steps // 10), []
    with tqdm(range(options.steps), desc="contrasting", unit="step", disable=None) as bar:
        for step in bar:
            done = (step - warmup) / max(1, options.steps - warmup)
            share = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * done)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * share
            a, b = pairs.batch(options.batch)
            loss = contrast(encode(model, a), encode(model, b), options.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    save(options.out, model, config, tokenizer)
    last = losses[-max(1, options.steps // 10) :]
    return sum(last) / len(last)


def save(out: Path, model: Bert, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The public form of a BERT encoder's folder."""
    state = model.state_dict()
    with atomic_folder(out, keep_others=True) as folder:
        write_json(folder / "config.json", config)
        write_text(folder / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
        write_safetensors(folder / "model.safetensors", shapes, lambda key: iter([state[key]]))


def main(options: Options) -> None:
    config = options.out / "config.json"
    if options.out.exists() and not (config.is_file() and "BertModel" in read_json(config).get("architectures", ())):
        raise UserError(f"{options.out}: exists and is no encoder; choose another --out")
    with output(options.out, options.overwrite):
        loss = train(options)
    chance = math.log(options.batch)
    print(f"{options.out}: {options.steps} steps, loss {loss:.3f} at the end (a guess: {chance:.3f})")


if __name__ == "__main__":
    run(main, Options)
