"""Options of a training run: a TOML file, overridden by `--key value` on the command line.

Every option is a field of `Recipe`, which checks itself when it is built. Both programs share it; options of only one
stage are marked "instruct only" or "pretrain only".
"""

from __future__ import annotations

import itertools
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from lora import LoRAConfig
from model.support import cli as command
from model.support.checks import inside
from model.support.cli import UserError, nearest, one_line
from model.support.files import read_text
from train.data.store import Encoding

INTERVALS = {
    "[1, 1e9]": "batch_rows micro_rows r valid_rows keep_last",
    "[2, 1e9]": "block",
    "[0, 1e9]": "steps epochs warmup valid_every save_every records",
    "[0, 1e18]": "seed",
    "[0, 1024]": "threads",
    "[0, 1]": "warmup_share empty_kept",
    "[0, 1)": "dropout",
    "(0, inf)": "alpha",
    "(0, 100)": "learning_rate muon_rate",
    "[0, 1e6)": "weight_decay clip note_loss",
}


@dataclass(frozen=True)
class Recipe:
    """Train a model or an adapter as a recipe (TOML) and these options say; data and out are required."""

    data: tuple[str, ...] = ()
    """JSON-lines files to train on."""
    out: str = ""
    """The run's folder: run.json, metrics.jsonl, adapter/ or model/, checkpoints/."""
    weights: str = ""
    """The base model's folder."""
    init: str = ""
    """A config.json: train newly initialised weights of this shape instead of `weights` (needs full and tokenizer)."""
    tokenizer: str = ""
    """The tokenizer's folder (empty: that of the weights)."""
    adapter: str = ""
    """An adapter to continue, with its own rank, scale, dropout and modules (empty: a new one)."""
    merge_adapter: bool = False
    """Merge `adapter` into the base, save the result in out/base, and train a new adapter on it."""
    valid_data: tuple[str, ...] = ()
    """JSON-lines files for the held-out loss."""
    valid_rows: int = 64
    """Largest number of held-out rows."""
    records: int = 0
    """Number of records of the data to use, from the first (0: all)."""

    steps: int = 0
    """Optimizer steps (0: as many as `epochs` needs)."""
    epochs: float = 1.0
    """Passes over the data, if `steps` is 0."""
    batch_rows: int = 4
    """Rows per optimizer step, over all ranks."""
    micro_rows: int = 1
    """Rows per forward and backward pass on one rank; gradients are accumulated over the batch."""
    sharded: bool = True
    """Shard the weights over the ranks (FSDP). false: every rank holds all of them and only the adapters' gradients are
    reduced, which is faster if the model fits."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_share: float = 0.0
    """Warm-up as a share of all steps, if `warmup` is 0."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    """adamw8bit: AdamW with blockwise 8-bit moments. muon: Muon for the layers' matrices, AdamW for the rest."""
    muon_rate: float = 0.02
    """Muon's peak learning rate (AdamW uses learning_rate)."""
    weight_decay: float = 0.01
    """Weight decay, of matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    clip: float = 1.0
    """Largest global gradient norm (0: no clipping)."""
    seed: int = 0
    """Seed of the data order, new weights and dropout."""

    full: bool = False
    """Train all weights instead of an adapter."""
    r: int = 8
    """Adapter rank."""
    alpha: float = 16.0
    """Adapter scale: alpha / r."""
    dropout: float = 0.0
    """Dropout probability of the adapter's inputs."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter."""

    base: Literal["", "nf4", "int8"] = ""
    """Format of the frozen base (empty: dtype)."""

    block: int = 1024
    """Largest number of tokens in a row."""
    packing: Literal["documents", "none", "concatenate"] = "documents"
    """documents: several texts per row, masked from each other, positions from 0 in each. none: one text per row.
    concatenate (pretrain only, as the paper's scripts): texts concatenated and cut, no mask, the tail dropped."""
    template: Literal["note-first", "faithful"] = "note-first"
    """instruct only. note-first: the note, then the question. faithful: as the paper's scripts, the question first."""
    share_prefix: bool = True
    """instruct only: one row holds a note once, and its questions as branches (note-first only)."""
    tasks: Literal["both", "phenotype", "diagnosis"] = "both"
    """instruct only: which questions are trained."""
    loss_on: Literal["answer", "all"] = "answer"
    """instruct only: loss on the answer only, or on the prompt too (as the paper's scripts)."""
    append_eos: bool = True
    """instruct only: end answers with EOS (false: as the paper's scripts; the model does not learn to stop)."""
    empty_kept: float = 1.0
    """instruct only: share of the questions answered "not relevant" to train on."""
    note_loss: float = 0.0
    """instruct only: weight of the language-model loss on the note itself."""

    valid_every: int = 0
    """Steps between held-out losses (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Number of checkpoints kept, besides the best one."""
    resume: bool = True
    """Resume from the newest intact checkpoint in `out`, if there is one."""
    allow_changed: bool = False
    """Resume even if the recipe or the data changed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if available. Under torchrun each rank of a machine takes a GPU of its own."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of the computation and of a frozen base. Trained parameters are kept in at least fp32."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass (activation checkpointing): less memory, a third more time."""
    compile: bool = False
    """Compile the decoder blocks with torch.compile."""
    fuse: bool = False
    """On a CUDA device: blocks of Triton kernels (infer/engine/fuse.py), for adapters on a frozen base only."""
    threads: int = 0
    """CPU threads (0: torch's default)."""

    def __post_init__(self) -> None:
        for interval, names in INTERVALS.items():
            for name in names.split():
                inside(f"recipe: {name}", getattr(self, name), interval)
        init, shared = bool(self.init), self.template == "faithful" and self.share_prefix
        uneven = self.batch_rows % self.micro_rows > 0
        rules = {
            "data is missing: give --data FILE.jsonl": not self.data,
            "out is missing: give --out FOLDER": not self.out,
            "give either weights (a model's folder) or init (a config.json)": bool(self.weights) == init,
            "init trains from nothing: it needs full = true and a tokenizer": init
            and not (self.full and self.tokenizer),
            "give either warmup (steps) or warmup_share (of all steps)": self.warmup > 0 and self.warmup_share > 0,
            f"betas are {self.betas}; they are two numbers in [0, 1)": [0 <= b < 1 for b in self.betas] != [True, True],
            "steps is 0 and epochs is 0; give one of them": not self.steps and not self.epochs,
            f"batch_rows {self.batch_rows} is not a multiple of micro_rows {self.micro_rows}": uneven,
            "full trains all weights: leave out adapter and base": self.full and bool(self.adapter or self.base),
            "sharded = false is for adapters; leave it out": self.full and not self.sharded,
            "fuse is for adapters, and not with compile": self.fuse and (self.full or self.compile),
            "merge_adapter needs adapter, the folder of the adapter to merge": self.merge_adapter and not self.adapter,
            "muon is for full training; use adamw for adapters": self.optimizer == "muon" and not self.full,
            "the faithful template has no shared prefix; set share_prefix = false": shared,
        }
        for message, broken in rules.items():
            if broken:
                raise UserError(f"recipe: {message}")
        if self.steps:
            self.steps_of(0)

    def steps_of(self, rows: int) -> int:
        """Number of optimizer steps of a run over so many rows. Raises UserError if the warm-up is longer."""
        steps = self.steps or max(1, round(self.epochs * rows / self.batch_rows))
        if self.warmup > steps:
            raise UserError(
                f"recipe: warmup of {self.warmup} steps is longer than the run of {steps}; "
                f"give --warmup {steps // 10}, or more data"
            )
        return steps


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a recipe file. Raises UserError for invalid TOML, an unknown key or a value of the wrong type."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; give a recipe, for example train/recipes/cancerllm.toml")
    text = read_text(Path(path))
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # bad TOML, nested too deep, or an integer too long
        raise UserError(f"{path}: not a TOML file: {one_line(error)}") from error
    for key, value in raw.items():
        raw[key] = checked(key, value, str(path))
    return raw


def checked(key: str, value: Any, where: str) -> Any:
    """`value` converted to the type of the option `key`. Raises UserError beginning with `where` if that fails."""
    known = {option.name: {} if option.default is MISSING else option.default for option in fields(Recipe)}
    if key not in known:
        raise UserError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
    hint = get_type_hints(Recipe)[key]
    if get_origin(hint) is Literal and value not in get_args(hint):
        near = nearest(str(value), get_args(hint))
        raise UserError(f"{where}: {key} is {value!r}{near}; it is one of {get_args(hint)}")
    return as_type(value, known[key], f"{where}: {key}")


def as_type(value: Any, default: Any, where: str) -> Any:
    """`value` converted to the type of `default`; UserError otherwise."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list) else [value]
        kind: type = type(default[0]) if default else str
        return tuple(as_type(item, kind(), where) for item in items)

    if isinstance(default, float) and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not type(default):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{where} is {value!r}; it must be {kinds[type(default)]}")
    return value


def parse(argv: Sequence[str] | None, stage: str) -> Recipe:
    """Parses RECIPE.toml [--key value …]. `argv` None: the command line."""
    from tyro.conf import FlagConversionOff, OmitArgPrefixes

    overrides = list(sys.argv[1:] if argv is None else argv)
    file = overrides.pop(0) if overrides and not overrides[0].startswith("-") else None
    if file is None and not {"-h", "--help"} & set(overrides):
        raise UserError(f"usage: python -m train.{stage} RECIPE.toml [--key value …]; --help explains every key")
    raw = read_toml(file) if file else {}
    # the file's values are the defaults of the command line; the result is checked once, as a whole
    unchecked = unchecked_recipe()
    options = command.parse(
        unchecked,
        with_values(overrides),
        f"python -m train.{stage} RECIPE.toml",
        default=unchecked(**raw),
        config=(OmitArgPrefixes, FlagConversionOff),
    )
    return Recipe(**asdict(options))


def with_values(arguments: list[str]) -> list[str]:
    """Expands a bare boolean flag: `--allow-changed` becomes `--allow-changed True`."""
    flags = {f"--{field.name}" for field in fields(Recipe) if isinstance(field.default, bool)}
    result: list[str] = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        result.append(argument)
        if argument.replace("-", "_").replace("__", "--", 1) in flags and following.startswith("--"):
            result.append("True")
    return result


def unchecked_recipe() -> type[Recipe]:
    """Recipe without its checks, to merge file and command line in."""
    return type("Options", (Recipe,), {"__post_init__": lambda self: None, "__doc__": Recipe.__doc__})


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """Dtype of the model's parameters: at least fp32 in full training.

    In bf16 an update at a learning rate of 2e-4 is smaller than the spacing of values near 1, so norms would not move.
    """
    dtype = getattr(torch, recipe.dtype)
    return torch.promote_types(dtype, torch.float32) if recipe.full else dtype


def lora_config(recipe: Recipe) -> LoRAConfig:
    """The configuration of a new adapter."""
    targets: Any = recipe.target_modules
    if targets == ("all-linear",):
        targets = "all-linear"
    return LoRAConfig(recipe.r, recipe.alpha, recipe.dropout, targets, rslora=recipe.rslora)


def encoding_of(recipe: Recipe, stage: str) -> Encoding:
    """The encoding of a recipe's records."""
    return Encoding(
        stage, recipe.tokenizer or recipe.weights, recipe.template, recipe.tasks, recipe.append_eos, recipe.empty_kept
    )
