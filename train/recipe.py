"""A training run as one flat set of options: a TOML file, then `--key value` on the command line.

Every option is a field of `Recipe`, checked where it is built. The two programs share it; what belongs to one stage
alone says so.
"""

from __future__ import annotations

import itertools
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from lora import LoRAConfig
from model.config import ModelConfig
from model.support import cli as command
from model.support.checks import inside
from model.support.cli import UserError, nearest, one_line
from train.data.store import Encoding

INTERVALS = {
    "[1, inf)": "batch_rows micro_rows r valid_rows keep_last",
    "[2, inf)": "block",
    "[0, inf)": "steps warmup valid_every save_every first_layer records seed",
    "[0, 1024]": "threads",
    "[0, 1]": "warmup_share final_rate empty_kept",
    "[0, 1)": "dropout",
    "(0, inf)": "alpha",
    "(0, 100)": "learning_rate muon_rate",
    "[0, 1e6)": "weight_decay clip note_loss",
}


@dataclass(frozen=True)
class Recipe:
    """Train a model or its adapters, by a recipe (TOML) and these options; data and out are needed."""

    data: tuple[str, ...] = ()
    """JSON-lines files to train on."""
    out: str = ""
    """The run's folder: run.json, metrics.jsonl, adapter/ or model/, checkpoints/."""
    weights: str = ""
    """The base model's folder."""
    init: str = ""
    """A config.json: train from freshly drawn weights of this shape instead of `weights` (needs full and tokenizer)."""
    tokenizer: str = ""
    """The tokenizer's folder (empty: that of the weights)."""
    adapter: str = ""
    """An adapter to continue, with its own rank, scale, dropout and modules (empty: a new one)."""
    merge_adapter: bool = False
    """Merge `adapter` into the base, write that base to out/base, and train a new adapter on it."""
    valid_data: tuple[str, ...] = ()
    """Held-out files for the validation loss."""
    valid_rows: int = 64
    """At most so many held-out rows."""
    records: int = 0
    """Use only the first so many records of the data (0: all)."""

    steps: int = 0
    """Optimizer steps (0: as many as `epochs` needs)."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is 0."""
    batch_rows: int = 4
    """Rows per optimizer step, over all ranks."""
    micro_rows: int = 1
    """Rows computed at once on one rank; the rest of the batch is accumulated."""
    sharded: bool = True
    """Divide the weights over the ranks (FSDP). false: every rank holds them whole, and only the adapters' gradients
    are sent, which is faster where the model fits."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up (to `final_rate` of its peak)."""
    final_rate: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_share: float = 0.0
    """Warm-up as a share of all steps, where `warmup` is 0."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    """adamw8bit keeps its state in blocks of 8 bits; muon trains matrices by Muon and the rest by AdamW."""
    muon_rate: float = 0.02
    """Muon's peak learning rate for matrices (the rest uses learning_rate)."""
    weight_decay: float = 0.01
    """On matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging."""
    clip: float = 1.0
    """Largest norm of the whole gradient (0: no clipping)."""
    seed: int = 0
    """Order of the data, start of new weights, dropout."""

    full: bool = False
    """Train all weights instead of an adapter."""
    r: int = 8
    """Adapter rank."""
    alpha: float = 16.0
    """Adapter scale: alpha / r."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which linear layers get an adapter."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks: a table of regular expressions for the end of a layer's name → rank, for example v_proj = 16."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""
    first_layer: int = 0
    """Adapters only from this decoder layer on: no gradient flows below it."""
    base: Literal["", "nf4", "int8", "w8a8"] = ""
    """Keep the frozen base in this quantized format (empty: in dtype). w8a8: its products are of 8-bit integers both
    ways, which on a processor with VNNI is faster than fp32's, and not than bf16's."""

    block: int = 1024
    """Largest number of tokens in a row."""
    packing: Literal["documents", "none", "concatenate"] = "documents"
    """documents: several texts a row, masked apart, positions reset. none: one text a row. concatenate (pretrain
    only, faithful to the paper's scripts): texts run together and cut, no mask, positions run on, the tail dropped."""
    template: Literal["note-first", "faithful"] = "note-first"
    """instruct only: the note before the question, or the paper's scripts' instruction first."""
    share_prefix: bool = True
    """instruct only: one row holds a note once and its questions as branches (note-first only)."""
    tasks: Literal["both", "phenotype", "diagnosis"] = "both"
    """instruct only: which questions are trained."""
    loss_on: Literal["answer", "all"] = "answer"
    """instruct only: the loss counts the answer, or (faithful) the prompt too."""
    append_eos: bool = True
    """instruct only: the answer ends in the end-of-text token (false: faithful, the model never learns to stop)."""
    empty_kept: float = 1.0
    """instruct only: share of the questions answered "not relevant" that are trained; the others are left out."""
    note_loss: float = 0.0
    """instruct only: weight of the note's own language-model loss beside that of the answers."""

    valid_every: int = 0
    """Steps between validation losses (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Checkpoints kept, beside the best one."""
    resume: bool = True
    """Resume from the newest whole checkpoint in `out`, if there is one."""
    allow_changed: bool = False
    """Resume although the recipe or the data changed."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one. Under torchrun each rank of a machine takes a GPU of its own."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What is computed in, and the dtype of a frozen base. What is trained is kept in at least fp32."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the model through torch.compile."""
    fuse: bool = False
    """On a CUDA device: the Triton kernels' blocks (infer/engine/fuse.py), adapters on a frozen base only."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""

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
            f"steps is 0 and epochs is {self.epochs}; give one of them": not self.steps
            and not 0 < self.epochs < math.inf,
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
        """Optimizer steps of a run over so many rows. Raises UserError where the warm-up is longer."""
        steps = self.steps or max(1, round(self.epochs * rows / self.batch_rows))
        if self.warmup > steps:
            raise UserError(
                f"recipe: warmup of {self.warmup} steps is longer than the run of {steps}; "
                f"give --warmup {steps // 10}, or more data"
            )
        return steps


def read_toml(path: str | Path) -> dict[str, Any]:
    """A recipe file's keys. Raises UserError for what is not TOML, not a key of Recipe, or of another type."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a recipe, for example train/recipes/cancerllm.toml")
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, too deep, or a number of thousands of digits
        raise UserError(f"{path}: not a TOML file: {one_line(error)}") from error
    for key, value in raw.items():
        raw[key] = checked(key, value, str(path))
    return raw


def checked(key: str, value: Any, where: str) -> Any:
    """`value` in the type of the option `key`, or a UserError that begins with `where`."""
    known = {each.name: {} if each.default is MISSING else each.default for each in fields(Recipe)}
    if key not in known:
        raise UserError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
    hint = get_type_hints(Recipe)[key]
    if get_origin(hint) is Literal and value not in get_args(hint):
        near = nearest(str(value), get_args(hint))
        raise UserError(f"{where}: {key} is {value!r}{near}; it is one of {get_args(hint)}")
    return as_type(value, known[key], f"{where}: {key}")


def as_type(value: Any, default: Any, where: str) -> Any:
    """`value` in the type of a default, or a UserError."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list) else [value]
        kind: type = type(default[0]) if default else str
        return tuple(as_type(item, kind(), where) for item in items)
    if isinstance(default, dict) and isinstance(value, dict):
        like = 0 if where.endswith(": rank_pattern") else 0.0
        return {key: as_type(item, like, f"{where}.{key}") for key, item in value.items()}
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table"}
        raise UserError(f"{where} is {value!r}; it must be {kinds[type(default)]}")
    return value


def parse(argv: Sequence[str] | None, stage: str) -> Recipe:
    """RECIPE.toml [--key value …] as a Recipe. `--help` explains every option."""
    from tyro.conf import FlagConversionOff, OmitArgPrefixes

    overrides = list(sys.argv[1:] if argv is None else argv)
    file = overrides.pop(0) if overrides and not overrides[0].startswith("-") else None
    if file is None and not {"-h", "--help"} & set(overrides):
        raise UserError(f"usage: python -m train.{stage} RECIPE.toml [--key value …]; --help explains every key")
    raw = read_toml(file) if file else {}
    # the file's values are the defaults; both are checked together, once
    loose = command.parse(
        loosened(),
        with_values(overrides),
        f"python -m train.{stage} RECIPE.toml",
        default=loosened()(**raw),
        config=(OmitArgPrefixes, FlagConversionOff),
    )
    return Recipe(**asdict(loose))


def with_values(arguments: list[str]) -> list[str]:
    """`--allow-changed` alone as `--allow-changed True`, for every option that is true or false."""
    flags = {f"--{field.name}" for field in fields(Recipe) if isinstance(field.default, bool)}
    result: list[str] = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        result.append(argument)
        if argument.replace("-", "_").replace("__", "--", 1) in flags and following.startswith("--"):
            result.append("True")
    return result


def loosened() -> type[Recipe]:
    """Recipe without its checks: the form in which file and command line meet."""
    return type("Options", (Recipe,), {"__post_init__": lambda self: None, "__doc__": Recipe.__doc__})


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the model's parameters. Full training in bf16 updates fp32 masters: a step at 2e-4 is less than
    bf16's spacing, and norms would not move."""
    dtype = getattr(torch, recipe.dtype)
    return torch.promote_types(dtype, torch.float32) if recipe.full else dtype


def lora_config(recipe: Recipe, config: ModelConfig) -> LoRAConfig:
    targets: Any = recipe.target_modules
    if targets == ("all-linear",):
        targets = "all-linear"
    if recipe.first_layer >= config.num_hidden_layers:
        raise UserError(f"recipe: first_layer {recipe.first_layer}; the model has {config.num_hidden_layers} layers")
    layers = tuple(range(recipe.first_layer, config.num_hidden_layers)) if recipe.first_layer else None
    patterns = recipe.rank_pattern, recipe.alpha_pattern
    return LoRAConfig(recipe.r, recipe.alpha, recipe.dropout, targets, layers, recipe.rslora, *patterns)


def encoding_of(recipe: Recipe, stage: str) -> Encoding:
    """How a recipe's records become ids."""
    return Encoding(
        stage, recipe.tokenizer or recipe.weights, recipe.template, recipe.tasks, recipe.append_eos, recipe.empty_kept
    )
