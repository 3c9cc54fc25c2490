"""Public dense encoders with one interface: `Encoder.from_pretrained(path, kind).encode(texts)`.

    kind         model                             input (tokens)                            pooling        similarity
    contriever   BERT                              title text (512)                          mean           dot
    medcpt       BERTs in query/, document/        query (64), [CLS] title [SEP] text (512)  first token    dot
    specter2     BERT in base/, adapters in        title [SEP] text (512)                    first token    euclidean
                 proximity/ (documents) and
                 adhoc_query/
    sgpt         GPT-Neo                           [query], {document} (300, without the     mean weighted  cosine
                                                   brackets)                                 by position
    sentence-transformers: any BERT in that library's format; its files set length and pooling (`sentence_kind`)

A folder holds config.json, model.safetensors and tokenizer.json (or vocab.txt).
Contriever: Izacard et al. 2021; MedCPT: Jin et al. 2023; SPECTER2: Singh et al. 2022; SGPT: Muennighoff 2022;
sentence-transformers: Reimers and Gurevych 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from infer.retrieval.bert import Bert, Bottleneck
from infer.retrieval.gpt_neo import GPTNeo
from model.checkpoints.safetensors import open_safetensors
from model.support.cli import UserError
from model.support.files import read_json

Text = str | tuple[str, str]
"""A text, or (title, text)."""


@dataclass(frozen=True)
class Kind:
    """Properties of a public encoder. `limit` (of documents) and `query_limit` are in tokens, including special ones
    but not SGPT's brackets. `folders` are those of the document and the query model. `unit`: vectors are normalized."""

    family: str
    pooling: str
    similarity: str
    limit: int
    query_limit: int
    folders: tuple[str, str] = (".", ".")
    unit: bool = False


KINDS = {
    "contriever": Kind("bert", "mean", "dot", 512, 512),
    "medcpt": Kind("bert", "first", "dot", 512, 64, ("document", "query")),
    "specter2": Kind("bert", "first", "euclidean", 512, 512, ("proximity", "adhoc_query")),
    "sgpt": Kind("gpt_neo", "weighted", "cosine", 300, 300),
}
SENTENCES = "sentence-transformers"
POOLINGS = {"cls_token": "first", "cls": "first", "mean_tokens": "mean", "mean": "mean"}
BRACKETS = {False: ("{", "}"), True: ("[", "]")}


class Encoder:
    """A document model and a query model (often the same one) with their tokenizers.

    `cut` is the number of texts so far that were truncated to the encoder's limit.
    """

    def __init__(
        self, name: str, kind: Kind, document: nn.Module, query: nn.Module, tokenizers: tuple[Tokenizer, Tokenizer]
    ):
        self.name, self.kind = name, kind
        self.models = {False: document.eval(), True: query.eval()}
        self.tokenizers = {False: tokenizers[0], True: tokenizers[1]}
        self.similarity = self.kind.similarity
        self.cut = 0

    @classmethod
    def from_pretrained(cls, path: str | Path, kind: str) -> Encoder:
        """Loads an encoder from its folder. Raises UserError for an unknown kind, another architecture, or missing
        files."""
        path, known = Path(path), (*KINDS, SENTENCES)
        if kind not in known:
            raise UserError(f"{kind!r} is not a supported encoder; supported are {', '.join(known)}")
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folder of {kind} (see infer/retrieval/README.md)")
        rule = sentence_kind(path) if kind == SENTENCES else KINDS[kind]
        bases = ("base", "base") if kind == "specter2" else rule.folders
        for name in {*bases, *rule.folders}:
            if not (path / name).is_dir():
                raise UserError(f"{path}: lacks the folder {name}/ of {kind} (see infer/retrieval/README.md)")
        models: list[Bert | GPTNeo] = []
        for base, part in zip(bases, rule.folders, strict=True):
            if models and (base, part) == (bases[0], rule.folders[0]):
                models.append(models[0])
                continue
            model = load_model(path / base, rule.family)
            if kind == "specter2" and isinstance(model, Bert):
                add_adapters(model, path / part)
            models.append(model)
        return cls(kind, rule, models[0], models[1], (load_tokenizer(path / bases[0]), load_tokenizer(path / bases[1])))

    @torch.inference_mode()
    def encode(self, texts: Sequence[Text], query: bool = False, batch: int = 32) -> np.ndarray:
        """Vectors of texts, float32 (len(texts), width). Texts of similar length share a batch, to save padding.

        Raises UserError for an empty query.
        """
        if query and any(not "".join(text).strip() for text in texts):
            raise UserError("the query is empty; give it a word to search for")
        rows = [self.tokens(text, query) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        model = self.models[query]
        width = next(model.parameters()).shape[1]
        out_ND = np.empty((len(rows), width), dtype=np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens_BT, mask_BT, types_BT = pad([rows[i] for i in chosen])
            vectors_BD = pool(model(tokens_BT, mask_BT, types_BT), mask_BT, self.kind.pooling)
            out_ND[chosen] = (F.normalize(vectors_BD) if self.kind.unit else vectors_BD).numpy()
        return out_ND

    def tokens(self, text: Text, query: bool) -> tuple[list[int], list[int]]:
        """Token ids and segment ids of a text, truncated to the encoder's limit."""
        tokenizer = self.tokenizers[query]
        limit = self.kind.query_limit if query else self.kind.limit
        title, body = text if isinstance(text, tuple) else ("", text)

        def ids(string: str) -> list[int]:
            return tokenizer.encode(string, add_special_tokens=False).ids

        if self.kind.family == "gpt_neo":
            opening, closing = (ids(mark) for mark in BRACKETS[query])
            inner = self.clip(ids(joined(title, body)), limit)
            return [*opening, *inner, *closing], [0] * (len(inner) + 2)
        first, last = special(tokenizer, "[CLS]"), special(tokenizer, "[SEP]")
        if self.name == "medcpt" and not query:
            a, b = longest_first(ids(title), ids(body), limit - 3)
            self.cut += len(a) + len(b) < len(ids(title)) + len(ids(body))
            return [first, *a, last, *b, last], [0] * (len(a) + 2) + [1] * (len(b) + 1)
        inner = ids(joined(title, body))
        if self.name == "specter2" and title:
            inner = [*ids(title), last, *ids(body)]
        inner = self.clip(inner, limit - 2)
        return [first, *inner, last], [0] * (len(inner) + 2)

    def clip(self, ids: list[int], limit: int) -> list[int]:
        self.cut += len(ids) > limit
        return ids[:limit]


def joined(title: str, body: str) -> str:
    return f"{title} {body}" if title else body


def longest_first(a: list[int], b: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Truncates a pair to `limit` ids in total, the longer one first, like the tokenizers library's `longest_first`."""
    if len(a) + len(b) <= limit:
        return a, b
    keep = min(len(a), len(b), limit // 2)  # length of the shorter one
    return (a[:keep], b[: limit - keep]) if len(a) <= len(b) else (a[: limit - keep], b[:keep])


def special(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token. Raises UserError if the tokenizer lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no {token}: not a BERT tokenizer; give the encoder's own folder")
    return found


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens_BT, mask_BT, types_BT, padded on the right with id 0."""
    tokens_BT = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    types_BT = pad_sequence([torch.tensor(types) for _, types in rows], batch_first=True)
    length_B1 = torch.tensor([[len(ids)] for ids, _ in rows])
    return tokens_BT, torch.arange(tokens_BT.shape[1]) < length_B1, types_BT


def pool(x_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """One vector per text: the first token's, the mean, or the mean weighted by position 1 … n."""
    if pooling == "first":
        return x_BTD[:, 0]
    mask_BT1 = mask_BT.unsqueeze(-1)
    if pooling == "mean":
        return x_BTD.masked_fill(~mask_BT1, 0.0).sum(1) / mask_BT.sum(1)[:, None]
    weights_T1 = torch.arange(1, x_BTD.shape[1] + 1, dtype=x_BTD.dtype)[:, None]
    weights_BT1 = mask_BT1 * weights_T1
    return (x_BTD * mask_BT1 * weights_T1).sum(1) / weights_BT1.sum(1)


def sentence_kind(path: Path) -> Kind:
    """Reads the Kind of a sentence-transformers folder: modules.json lists the transformer, pooling and, optionally,
    normalization. Raises UserError for other modules or poolings, and for prompts before texts."""
    try:
        modules = read_json(path / "modules.json")
        names = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise UserError(f"{path}: supported are Transformer, Pooling and Normalize, not {', '.join(names)}")
        folder, pooling_folder = (module["path"] or "." for module in modules[:2])
        pooling = read_json(path / pooling_folder / "config.json")
        modes = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if "mode_" in key and value]
        modes = modes or [pooling["pooling_mode"]]  # the format of later versions
        if len(modes) != 1 or modes[0] not in POOLINGS:
            raise UserError(f"{path}: pooling by {' and '.join(modes)} is not supported; mean and first token are")
        limit = min(
            read_json(path / folder / "sentence_bert_config.json")["max_seq_length"],
            read_json(path / folder / "config.json")["max_position_embeddings"],
        )
        options = read_json(path / "config_sentence_transformers.json")
        if any((options.get("prompts") or {}).values()):
            raise UserError(f"{path}: it puts prompts before texts, which is not supported")
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a sentence-transformers model; copy the whole folder again") from error
    similarity = options.get("similarity_fn_name") or "cosine"
    return Kind("bert", POOLINGS[modes[0]], similarity, limit, limit, (folder, folder), unit=len(names) == 3)


def load_model(folder: Path, family: str) -> Bert | GPTNeo:
    """Loads an encoder from config.json and model.safetensors, without unused heads (pooler, lm_head)."""
    config = read_json(folder / "config.json")
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != family:
        raise UserError(f"{folder / 'config.json'}: model_type {found!r}, but this encoder is a {family!r}")
    activation = config.get("hidden_act" if family == "bert" else "activation_function")
    if activation != ("gelu" if family == "bert" else "gelu_new"):
        raise UserError(f"{folder / 'config.json'}: activation {activation!r} is not supported")
    try:
        model: Bert | GPTNeo = Bert(config) if family == "bert" else GPTNeo(config)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: lacks {error}") from error
    fill(model, tensors(folder, "model.safetensors", "bert." if family == "bert" else "transformer."), folder)
    return model


def tensors(folder: Path, name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file by name, without a prefix that some public files have."""
    if not (folder / name).exists():
        raise UserError(f"{folder}: no {name}; if there is a .bin, convert it (see infer/retrieval/README.md)")
    stored = open_safetensors(folder / name)
    return {key.removeprefix(prefix): value.read(None).float() for key, value in stored.items()}


def fill(model: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Copies tensors into the model's parameters. Raises UserError if one is missing or has another shape."""
    for name, parameter in model.named_parameters():
        if name not in state:
            raise UserError(f"{where}: lacks the tensor {name}")
        if state[name].shape != parameter.shape:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        parameter.data.copy_(state[name])


def add_adapters(model: Bert, folder: Path) -> None:
    """Loads a folder's bottleneck adapters (in the adapters library's format) into the feed-forward blocks.

    Raises UserError for adapters that are not configured like SPECTER2's.
    """
    saved: Any = read_json(folder / "adapter_config.json")
    config = saved.get("config", {}) if isinstance(saved, dict) else {}
    required = {
        "non_linearity": "relu",
        "mh_adapter": False,
        "output_adapter": True,
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "ln_before": False,
        "ln_after": False,
    }
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder / 'adapter_config.json'}: {key} is {config[key]!r}; supported is {value!r}")
    stored = tensors(folder, "adapter.safetensors", "bert.")
    for number, layer in enumerate(model.layers):
        prefix = f"encoder.layer.{number}.output.adapters."
        state = {key[len(prefix) :].split(".", 1)[1]: value for key, value in stored.items() if key.startswith(prefix)}
        if "adapter_up.weight" not in state:
            raise UserError(f"{folder}: has no adapter for layer {number}")
        width, inner = state["adapter_up.weight"].shape
        layer.output.adapter = Bottleneck(width, inner)
        fill(layer.output.adapter, state, folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads tokenizer.json, else vocab.txt (WordPiece). Names of special tokens in a text are encoded as text."""
    file, vocabulary, config = (folder / name for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    if not (file.exists() or vocabulary.exists()):
        raise UserError(f"{folder}: no tokenizer.json or vocab.txt; copy the encoder's")
    try:
        if file.exists():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            lower = bool(read_json(config).get("do_lower_case", True)) if config.exists() else True
            tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=lower)._tokenizer
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: the tokenizer's file is corrupt; download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def files(path: Path) -> Iterator[Path]:
    """The files that determine an encoder's vectors, in order."""
    return (file for file in sorted(path.rglob("*")) if file.suffix in (".json", ".safetensors", ".txt"))
