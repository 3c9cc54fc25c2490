"""Putting adapters on a model, choosing one, and PEFT's two files in both directions.

PEFT's files are `adapter_config.json` and `adapter_model.safetensors`, whose keys are `base_model.model.` + the
module's name + `.lora_A.weight` (R × in) or `.lora_B.weight` (out × R). PEFT loads them non-strictly; here a missing,
surplus or misshapen tensor is an error, and a config field that asks for other arithmetic is refused by name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.origin import TRAINED_ON, adapter_file, origin
from model.checkpoints.safetensors import save_tensors
from model.support.cli import UserError, nearest
from model.support.files import atomic_folder, read_json, write_json

PREFIX = "base_model.model."
# What PEFT 0.21 may write and what each field must be for the arithmetic here to be the adapter's.
READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
)  # fmt: skip
HARMLESS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying",
)  # fmt: skip  # how the start was chosen, or a default that nothing reads: the tensors hold the result
REFUSED = (
    "fan_in_fan_out", "modules_to_save", "megatron_config", "trainable_token_indices", "use_dora", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "loftq_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# Starts that leave the base's weights as they are. The others (pissa, olora, corda, loftq, lora_ga, mica) train beside
# a changed base, so that their A and B mean nothing beside the original one.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get an adapter and of what size. Raises UserError for impossible values."""

    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names that modules end in, or "all-linear" (every linear layer but the output head)."""
    layers: tuple[int, ...] | None = None
    """Only these decoder layers (None: all)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks: regular expression for the end of a module's name → rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""
    exclude_modules: str | tuple[str, ...] = ()
    """Names that modules end in which get none, or a regular expression for whole names."""

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"lora: rank {rank!r} for {name!r}; a rank is a whole number of at least 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
                raise UserError(f"lora: alpha {alpha!r} for {name!r}; it is a number above 0")
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *self.expressions()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora: {pattern!r} is not a regular expression: {error}") from error
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora: dropout is {self.dropout}; it must lie in [0, 1)")
        if not self.target_modules:
            raise UserError('lora: target_modules is empty; name modules, or say "all-linear"')

    def expressions(self) -> list[str]:
        return [value for value in (self.target_modules, self.exclude_modules) if isinstance(value, str)]

    def wants(self, path: str) -> bool:
        """Whether the linear layer with this name gets an adapter."""
        if path == "lm_head" and self.target_modules == "all-linear":
            return False
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, path):
                return False
        elif any(ends_in(path, name) for name in self.exclude_modules):
            return False
        if self.layers is not None:
            layer = re.search(r"\.layers\.(\d+)\.", path)
            if layer is None or int(layer.group(1)) not in self.layers:
                return False
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or re.fullmatch(self.target_modules, path) is not None
        return any(ends_in(path, name) for name in self.target_modules)

    def rank(self, path: str) -> int:
        return pattern_value(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        rank = self.rank(path)
        return pattern_value(self.alpha_pattern, path, self.alpha) / (rank**0.5 if self.rslora else rank)


def ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value whose pattern matches the end of `path`, as PEFT matches rank_pattern; the first one wins."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that can carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 0) -> nn.Module:
    """Add a new adapter to `model` in place, make it active, and freeze everything else. Returns the model.

    Raises UserError where no module fits, a named target fits none, or an adapter of this name is there already.
    """
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [path for path in linears if config.wants(path)]
    check_targets(config, list(linears), chosen)
    if not name or "." in name:
        raise UserError(f"lora: {name!r} cannot be an adapter's name: it is part of its parameters' names, so no dots")
    refuse_merged(model)
    if any(name in layer.scale for layer in adapted(model).values()):
        raise UserError(f"lora: the model already has an adapter called {name!r}; choose another name")
    model.requires_grad_(False)
    for path in chosen:
        layer = as_lora(model, path)
        layer.add(name, config.rank(path), config.scale(path), config.dropout, seed)
    configs = model.__dict__.setdefault("lora_configs", {})
    configs[name] = config
    set_adapter(model, name)
    return model


def as_lora(model: nn.Module, path: str) -> LoRALinear:
    """The layer at `path`, made able to carry adapters."""
    linear = model.get_submodule(path)
    if not isinstance(linear, LoRALinear):
        assert isinstance(linear, nn.Linear), path
        linear = LoRALinear(linear, path)
        model.set_submodule(path, linear)
    return linear


def check_targets(config: LoRAConfig, linears: list[str], chosen: list[str]) -> None:
    if isinstance(config.target_modules, tuple):
        leaves = sorted({path.rpartition(".")[2] for path in linears})
        for target in config.target_modules:
            if not any(ends_in(path, target) for path in linears):
                raise UserError(
                    f"lora: target module {target!r} is not in this model{nearest(target, leaves)}; "
                    f"it has {', '.join(leaves)}"
                )
    if not chosen:
        raise UserError(f"lora: no linear layer of this model fits target_modules {config.target_modules!r}")


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active and trainable (None: none). Raises UserError where no adapter has this name."""
    layers = adapted(model).values()
    known = sorted({key for layer in layers for key in layer.scale})
    if name is not None and name not in known:
        raise UserError(f"lora: no adapter is called {name!r}{nearest(name, known)}; there are {known}")
    refuse_merged(model)
    for layer in layers:
        layer.active = name if name in layer.scale else None
        for matrices in (layer.lora_A, layer.lora_B):
            for key, matrix in matrices.items():
                matrix.requires_grad_(key == name)


def refuse_merged(model: nn.Module) -> None:
    """Merged weights hold the adapter that was active then: choosing another one would not take it out."""
    if any(layer.original is not None for layer in adapted(model).values()):
        raise UserError("lora: an adapter is merged into the weights; call unmerge_lora first")


@contextlib.contextmanager
def no_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base. Raises UserError while an adapter is merged."""
    refuse_merged(model)
    before = {layer: layer.active for layer in adapted(model).values()}
    for layer in before:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys."""
    state = {}
    for path, layer in adapted(model).items():
        if name in layer.scale:
            for kind, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                state[f"{PREFIX}{path}.{kind}.weight"] = matrices[name].detach()
    return state


def peft_config(config: LoRAConfig, base: str | None, modules: list[str]) -> dict[str, Any]:
    """adapter_config.json's content, for an adapter on these modules."""
    targets = config.target_modules
    if isinstance(targets, str) and config.layers is not None:  # PEFT takes layers only beside a list of names
        targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha if config.alpha != int(config.alpha) else int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": config.exclude_modules
        if isinstance(config.exclude_modules, str)
        else list(config.exclude_modules) or None,
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None if config.layers is None else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", base: str | os.PathLike[str] | None = None
) -> None:
    """Write an adapter as PEFT does, atomically; a folder that is there keeps its other files. `base` is the weights'
    place, written down for the reader."""
    configs = model.__dict__.get("lora_configs", {})
    if name not in configs:
        raise UserError(f"lora: the model has no adapter called {name!r}{nearest(name, list(configs))}")
    with atomic_folder(path, keep_others=True) as folder:
        write_adapter(folder, configs[name], adapter_state(model, name), base)


def write_adapter(
    folder: Path, config: LoRAConfig, state: dict[str, Tensor], base: str | os.PathLike[str] | None = None
) -> None:
    """PEFT's two files in a folder that is there, and what the adapter was trained on where `base` is at hand."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in sorted(state.items())}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    modules = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    write_json(folder / "adapter_config.json", peft_config(config, None if base is None else str(base), modules))
    if base and Path(base).exists():
        write_json(folder / TRAINED_ON, origin(base))


def read_config(path: str | os.PathLike[str]) -> LoRAConfig:
    """The LoRAConfig of a PEFT folder. Raises UserError for what is missing, or asks for other arithmetic."""
    where = Path(path) / "adapter_config.json"
    raw = read_json(where)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is not LORA; only LoRA adapters are covered")
    for key, value in raw.items():
        if key == "bias":
            if value not in (None, "none"):
                raise UserError(f"{where}: bias {value!r} is not covered; train the adapter with bias 'none'")
        elif key in REFUSED:
            if value:
                raise UserError(f"{where}: {key} is not covered; it changes what the adapter computes")
        elif key == "init_lora_weights":
            if value not in STARTS:
                raise UserError(f"{where}: init_lora_weights {value!r} changes the base's weights too, which is not "
                                "covered; save the adapter converted to plain LoRA")  # fmt: skip
        elif key == "layers_pattern":
            if value not in (None, "", "layers", [], ["layers"]):
                raise UserError(f"{where}: layers_pattern {value!r} is not covered; these models' layers are 'layers'")
        elif key not in READ and key not in HARMLESS and value not in (None, False, {}, []):
            raise UserError(f"{where}: unknown field {key!r}; what it asks for is not covered")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]
    if missing:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    try:
        return config_from(raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a field holds another kind of value than PEFT writes ({error})") from error


def config_from(raw: dict[str, Any]) -> LoRAConfig:
    targets, layers = raw["target_modules"], raw.get("layers_to_transform")
    exclude = raw.get("exclude_modules") or ()
    return LoRAConfig(
        r=raw["r"],
        alpha=float(raw["lora_alpha"]),
        dropout=float(raw.get("lora_dropout") or 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,  # an empty list: all
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        alpha_pattern=dict(raw.get("alpha_pattern") or {}),
        exclude_modules=exclude if isinstance(exclude, str) else tuple(exclude),
    )


def read_adapter(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a PEFT folder, by PEFT's keys. Raises UserError where the file is missing or corrupt."""
    where = adapter_file(path)
    try:
        with safe_open(where, framework="pt") as data:
            return {key: data.get_tensor(key) for key in data.keys()}
    except SafetensorError as error:
        raise UserError(f"{where}: corrupt or not a safetensors file ({error})") from error


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Load PEFT's files onto `model` in place as an active, trainable adapter. Returns the model.

    Raises UserError where the files are corrupt, belong to another model, or ask for what is not covered.
    """
    config, tensors = read_config(path), read_adapter(path)
    check_tensors(model, tensors, config, path)
    add_lora(model, config, name)
    with torch.no_grad():
        for module, layer in adapted(model).items():
            if name in layer.scale:
                layer.lora_A[name].copy_(tensors[f"{PREFIX}{module}.lora_A.weight"])
                layer.lora_B[name].copy_(tensors[f"{PREFIX}{module}.lora_B.weight"])
    return model


def check_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], config: LoRAConfig, path: str | os.PathLike[str]
) -> None:
    """Every adapter tensor has its module, every module its tensors, and all shapes agree; else a UserError."""
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and config.wants(p)}
    expected = {}
    for module, linear in linears.items():
        rank = config.rank(module)
        expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, linear.in_features)
        expected[f"{PREFIX}{module}.lora_B.weight"] = (linear.out_features, rank)
    surplus, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    if surplus or missing:
        what = f"holds {surplus[0]!r}, which this model has no place for" if surplus else f"lacks {missing[0]!r}"
        raise UserError(f"{path}: the adapter {what}; it was made for another model or other target modules")
    for key, shape in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: {key} is {tuple(tensor.shape)} where this model needs {shape}; it was made for another model"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {key} holds values that are not finite; the file is corrupt")
