"""A training run as one flat set of options: a TOML file, then `--key value` on the command line.

Every option is a field of `Recipe`, checked where it is built. The two programs share it; what belongs to one stage
alone says so.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora import LoRAConfig
from model.config import ModelConfig
from model.support import cli as command
from model.support.cli import UserError, nearest, one_line
from train.data.store import Encoding


@dataclass(frozen=True)
class Recipe:
    """Options of `train.pretrain` and `train.instruct`."""

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
    """Fold `adapter` into the base, write that base to out/base, and train a new adapter on it."""
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
    base: Literal["", "nf4", "int8"] = ""
    """Keep the frozen base in this quantized format (empty: in dtype)."""

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
    """The base's dtype; adapters are at least fp32."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the model through torch.compile."""
    fuse: bool = False
    """On a CUDA device: the Triton kernels' blocks (infer/engine/fuse.py), adapters on a frozen base only."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""

    def __post_init__(self) -> None:
        at_least = {
            "batch_rows": 1,
            "micro_rows": 1,
            "r": 1,
            "block": 2,
            "steps": 0,
            "warmup": 0,
            "valid_every": 0,
            "save_every": 0,
            "keep_last": 1,
            "first_layer": 0,
            "records": 0,
            "threads": 0,
            "seed": 0,
            "valid_rows": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"recipe: warmup_share is {self.warmup_share}; it is a share of the steps, at most 1")
        if self.warmup and self.warmup_share:
            raise UserError("recipe: give either warmup (steps) or warmup_share (of all steps), and not both")
        if self.final_rate > 1:
            raise UserError(f"recipe: final_rate is {self.final_rate}; it is a share of the peak, at most 1")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"recipe: alpha is {self.alpha}; it must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"recipe: betas are {self.betas}; they are two numbers in [0, 1)")
        for name in ("learning_rate", "muon_rate"):
            if not 0 < getattr(self, name) < 100:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; it must lie between 0 and 100")
        for name in ("weight_decay", "clip", "note_loss", "final_rate"):
            if not 0 <= getattr(self, name) < 1e6:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; it must lie between 0 and a million")
        if not 0 <= self.empty_kept <= 1:
            raise UserError(f"recipe: empty_kept is {self.empty_kept}; it is a share, from 0 to 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"recipe: dropout is {self.dropout}; it must lie in [0, 1)")
        if self.steps == 0 and not 0 < self.epochs < float("inf"):
            raise UserError(f"recipe: steps is 0 and epochs is {self.epochs}; give one of them")
        if self.steps:
            self.steps_of(0)
        if self.batch_rows % self.micro_rows:
            raise UserError(
                f"recipe: batch_rows {self.batch_rows} is not a multiple of micro_rows {self.micro_rows}; change either"
            )
        self.check_together()

    def steps_of(self, rows: int) -> int:
        """Optimizer steps of a run over so many rows. Raises UserError where the warm-up is longer."""
        steps = self.steps or max(1, round(self.epochs * rows / self.batch_rows))
        if self.warmup > steps:
            raise UserError(f"recipe: warmup of {self.warmup} steps is longer than the run of {steps}")
        return steps

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up in a run of so many."""
        return self.warmup or math.ceil(self.warmup_share * steps)

    def check_together(self) -> None:
        if bool(self.weights) == bool(self.init):
            raise UserError("recipe: give either weights (a model's folder) or init (a config.json), and not both")
        if self.init and not (self.full and self.tokenizer):
            raise UserError("recipe: init trains from nothing, so it needs full = true and a tokenizer")
        if self.full and self.dtype == "bfloat16":  # a step at 2e-4 is less than bf16's spacing: norms would not move
            raise UserError("recipe: full = true keeps no fp32 copy of bfloat16 weights; set dtype = 'float32'")
        if self.full and (self.adapter or self.base):
            raise UserError("recipe: full trains all weights; leave out adapter and base, or set full = false")
        if self.fuse and (self.full or self.compile):
            raise UserError("recipe: fuse is for adapters, and not with compile; leave full and compile out")
        if self.merge_adapter and not self.adapter:
            raise UserError("recipe: merge_adapter needs adapter, the folder of the adapter to fold in")
        if self.optimizer == "muon" and not self.full:
            raise UserError("recipe: muon is for full training (full = true); use adamw for adapters")
        if self.template == "faithful" and self.share_prefix:
            raise UserError(
                "recipe: the faithful template puts the instruction before the note, so questions share no prefix; "
                "set share_prefix = false, or template = 'note-first'"
            )
        if not self.data or not self.out:
            raise UserError(f"recipe: {'data' if not self.data else 'out'} is missing")


def read_toml(path: str | Path) -> dict[str, Any]:
    """A recipe file's keys. Raises UserError for what is not TOML, not a key of Recipe, or of another type."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a recipe, for example train/recipes/cancerllm.toml")
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, too deep, or a number of thousands of digits
        raise UserError(f"{path}: not a TOML file: {one_line(error)}") from error
    known = {field.name: {} if field.default is MISSING else field.default for field in fields(Recipe)}
    for key, value in raw.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, list(known))}")
        raw[key] = checked(value, known[key], f"{path}: {key}")
    choices(raw, path)
    return raw


def checked(value: Any, default: Any, where: str) -> Any:
    """`value` in the type of the field's default, or a UserError."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list) else [value]
        kind: type = type(default[0]) if default else str
        return tuple(checked(item, kind(), where) for item in items)
    if isinstance(default, dict) and isinstance(value, dict):
        like = 0 if where.endswith(": rank_pattern") else 0.0
        return {key: checked(item, like, f"{where}.{key}") for key, item in value.items()}
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{where} is {value!r}; it must be {a_kind(default)}")
    return value


def a_kind(default: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table"}
    return kinds[type(default)]


def parse(argv: Sequence[str] | None, stage: str) -> Recipe:
    """RECIPE.toml [--key value …] as a Recipe. `--help` explains every option."""
    from tyro.conf import FlagConversionOff, OmitArgPrefixes

    argv = list(sys.argv[1:] if argv is None else argv)
    overrides, file = [], None
    if argv and not argv[0].startswith("-"):
        file, overrides = argv[0], argv[1:]
    else:
        overrides = argv
    if file is None and not any(flag in ("-h", "--help") for flag in argv):
        raise UserError(f"usage: python -m train.{stage} RECIPE.toml [--key value …]; --help explains every key")
    overrides = with_values(overrides)
    raw = read_toml(file) if file else {}
    # the file's values stand as defaults; they are checked together with the command line's, once
    loose = command.parse(
        loosened(),
        overrides,
        f"python -m train.{stage} RECIPE.toml",
        default=loosened()(**raw),
        config=(OmitArgPrefixes, FlagConversionOff),
    )
    return Recipe(**asdict(loose))


def with_values(arguments: list[str]) -> list[str]:
    """`--allow-changed` alone as `--allow-changed True`, for every option that is true or false."""
    flags = {f"--{field.name}" for field in fields(Recipe) if isinstance(field.default, bool)}
    said = []
    for place, argument in enumerate(arguments):
        said.append(argument)
        following = arguments[place + 1 : place + 2]
        if argument.replace("_", "-") in {flag.replace("_", "-") for flag in flags} and (
            not following or following[0].startswith("--")
        ):
            said.append("True")
    return said


def loosened() -> type[Recipe]:
    """Recipe without its checks: the form in which file and command line meet."""
    return type("Options", (Recipe,), {"__post_init__": lambda self: None, "__doc__": Recipe.__doc__})


def choices(raw: dict[str, Any], path: str | Path) -> None:
    """Every value of a Literal field is one of its own."""
    for name, hint in get_type_hints(Recipe).items():
        allowed = get_args(hint)
        if name in raw and get_origin(hint) is Literal and raw[name] not in allowed:
            raise UserError(f"{path}: {name} is {raw[name]!r}{nearest(raw[name], allowed)}; it is one of {allowed}")


def lora_config(recipe: Recipe, config: ModelConfig) -> LoRAConfig:
    targets: Any = recipe.target_modules
    if targets == ("all-linear",):
        targets = "all-linear"
    elif "lm_head" in targets:
        raise UserError("recipe: an adapter on lm_head is not covered; leave it out of target_modules")
    if recipe.first_layer >= config.num_hidden_layers:
        raise UserError(f"recipe: first_layer {recipe.first_layer}; the model has {config.num_hidden_layers} layers")
    layers = tuple(range(recipe.first_layer, config.num_hidden_layers)) if recipe.first_layer else None
    return LoRAConfig(
        recipe.r,
        recipe.alpha,
        recipe.dropout,
        targets,
        layers,
        recipe.rslora,
        recipe.rank_pattern,
        recipe.alpha_pattern,
    )


def encoding_of(recipe: Recipe, stage: str) -> Encoding:
    """How a recipe's records become ids."""
    return Encoding(
        stage, recipe.tokenizer or recipe.weights, recipe.template, recipe.tasks, recipe.append_eos, recipe.empty_kept
    )
