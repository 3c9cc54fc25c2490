"""Adapters in a model: choose the linear layers, add adapters, switch between them. PEFT's files: lora/peft.py."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora.layer import LoRALinear
from model.support.checks import inside, positive, whole
from model.support.cli import UserError, nearest

MATCH_SECONDS = 0.1  # time limit of one regular expression on one module name: patterns come from untrusted files


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get an adapter, and its rank and scale. Raises UserError for impossible values."""

    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Suffixes of module names, a regular expression for whole names, or "all-linear" (all but the output head)."""
    layers: tuple[int, ...] | None = None
    """Only these decoder layers (None: all)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r: regular expression for a suffix of the module name → rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from alpha, in the same form."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules without an adapter: suffixes of their names, or a regular expression for whole names."""

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            whole(f"lora: the rank for {name!r}", rank, 1, 2**20)
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            positive(f"lora: the alpha for {name!r}", alpha)
        names = (self.target_modules, self.exclude_modules)
        expressions = [value for value in names if isinstance(value, str) and value != "all-linear"]
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *expressions):
            check_expression(pattern)
        inside("lora: dropout", self.dropout, "[0, 1)")
        if not self.target_modules:
            raise UserError('lora: target_modules is empty; name modules, or say "all-linear"')

    def wants(self, path: str) -> bool:
        """True if the linear layer of this name gets an adapter."""
        if path == "lm_head":
            return False  # training and decoding use lm_head.weight without calling the module
        if selects(self.exclude_modules, path):
            return False
        if self.layers is not None:
            layer = re.search(r"\.layers\.(\d+)\.", path)
            if layer is None or int(layer.group(1)) not in self.layers:
                return False
        return self.target_modules == "all-linear" or selects(self.target_modules, path)

    def rank(self, path: str) -> int:
        return pattern_value(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        rank = self.rank(path)
        return pattern_value(self.alpha_pattern, path, self.alpha) / (rank**0.5 if self.rslora else rank)


def selects(names: str | tuple[str, ...], path: str) -> bool:
    """True if `names` selects the module: a regular expression for whole names (str), or suffixes (tuple)."""
    return matches(names, path) if isinstance(names, str) else any(ends_in(path, name) for name in names)


def ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def check_expression(pattern: str) -> None:
    import regex  # imported where used: the GPU benchmark runs without it

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"lora: {pattern!r} is not a regular expression: {error}") from error


def matches(pattern: str, path: str) -> bool:
    """True if a regular expression matches the whole name. Raises UserError after MATCH_SECONDS."""
    import regex

    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise UserError(f"lora: {pattern!r} takes too long to match; name the modules instead") from error


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches a suffix of `path` (PEFT's rule for rank_pattern), or `default`."""
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})", path):
            return value
    return default


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 0) -> nn.Module:
    """Add a new adapter to `model` in place, make it active, and freeze everything else. Returns the model.

    Raises UserError if no module is selected, a target name matches no module, or the adapter's name is taken.
    """
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [path for path in linears if config.wants(path)]
    check_targets(config, list(linears), chosen)
    if not name or "." in name:
        raise UserError(f"lora: {name!r} cannot be an adapter's name: it becomes part of parameter names; use no dots")
    refuse_merged(model)
    if any(name in layer.scale for layer in adapted(model).values()):
        raise UserError(f"lora: the model already has an adapter called {name!r}; choose another name")
    model.requires_grad_(False)
    for path in chosen:
        layer = linears[path]
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, path)
            model.set_submodule(path, layer)
        layer.add(name, config.rank(path), config.scale(path), config.dropout, seed)
    configs = model.__dict__.setdefault("lora_configs", {})
    configs[name] = config
    set_adapter(model, name)
    return model


def check_targets(config: LoRAConfig, linears: list[str], chosen: list[str]) -> None:
    if isinstance(config.target_modules, tuple):
        leaves = sorted({path.rpartition(".")[2] for path in linears})
        for target in config.target_modules:
            if target == "lm_head":
                raise UserError("lora: an adapter on lm_head is not supported; leave it out of target_modules")
            if not any(ends_in(path, target) for path in linears):
                known = f"{nearest(target, leaves)}; it has {', '.join(leaves)}"
                raise UserError(f"lora: target module {target!r} is not in this model{known}")
    if not chosen:
        raise UserError(f"lora: no linear layer of this model fits target_modules {config.target_modules!r}")


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active and trainable (None: no adapter). Raises UserError for an unknown name."""
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
    """Raises UserError while an adapter is merged: activating another would leave the merged one in the weights."""
    if any(layer.original is not None for layer in adapted(model).values()):
        raise UserError("lora: an adapter is merged into the weights; call unmerge_lora first")


@contextlib.contextmanager
def no_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which no adapter is active. Raises UserError while an adapter is merged."""
    refuse_merged(model)
    before = {layer: layer.active for layer in adapted(model).values()}
    for layer in before:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active
