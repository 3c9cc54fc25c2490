"""PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, in both directions.

Keys are `base_model.model.` + the module's name + `.lora_A.weight` (R × in) or `.lora_B.weight` (out × R). PEFT loads
them non-strictly; here a missing, surplus or misshapen tensor is an error, and a config field that asks for other
arithmetic is refused by name. Copies of the base's own weights, and target names that the model lacks, change nothing
and are skipped.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora.adapter import LoRAConfig, adapted, add_lora, ends_in
from lora.origin import TRAINED_ON, adapter_file, origin
from model.checkpoints.safetensors import open_safetensors, save_tensors
from model.checkpoints.weights import Checkpoint
from model.support.cli import UserError, nearest
from model.support.files import atomic_folder, read_json, write_json

PREFIX = "base_model.model."
Model = TypeVar("Model", bound=nn.Module)
LONGEST_CONFIG = 2**20  # bytes of adapter_config.json
# What PEFT 0.21 may write: fields that are read; that have no effect on loaded tensors; that are refused unless empty.
READ = set(
    "peft_type r lora_alpha lora_dropout target_modules exclude_modules use_rslora rank_pattern alpha_pattern "
    "layers_to_transform modules_to_save".split()
)
HARMLESS = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core "
    "qalora_group_size runtime_config eva_config ensure_weight_tying fan_in_fan_out".split()
)
REFUSED = set(
    "megatron_config trainable_token_indices use_dora velora_config alora_invocation_tokens use_qalora "
    "monteclora_config layer_replication lora_bias target_parameters use_bdlora arrow_config kasa_config "
    "loftq_config corda_config lora_ga_config".split()
)
# Starts that leave the base's weights as they are. The others (pissa, olora, corda, loftq, lora_ga, mica) train beside
# a changed base, so that their A and B mean nothing beside the original one.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": ((None, "none", "all", "lora_only"), "train the adapter with bias 'none'"),
    "init_lora_weights": (STARTS, "it changes the base's weights too; save the adapter converted to plain LoRA"),
    "layers_pattern": ((None, "", "layers", [], ["layers"]), "the layers of these models are called 'layers'"),
}


def adapter_state(
    model: nn.Module, name: str = "default", params: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys; `params`: the parameters by name, where the model's are sharded."""
    held = dict(model.named_parameters()) if params is None else params
    return {
        f"{PREFIX}{path}.{kind}.weight": held[f"{path}.{kind}.{name}"].detach()
        for path, layer in adapted(model).items()
        if name in layer.scale
        for kind in ("lora_A", "lora_B")
    }


def peft_config(config: LoRAConfig, base: str | None, modules: list[str]) -> dict[str, Any]:
    """adapter_config.json's content, for an adapter on these modules."""
    targets, layers, exclude = config.target_modules, config.layers, config.exclude_modules
    if isinstance(targets, str) and layers is not None:  # PEFT takes layers only beside a list of names
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
        "exclude_modules": exclude if isinstance(exclude, str) else list(exclude) or None,
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": None if layers is None else "layers",
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
    modules = adapted_modules(tensors)
    write_json(folder / "adapter_config.json", peft_config(config, None if base is None else str(base), modules))
    if base and Path(base).exists():
        write_json(folder / TRAINED_ON, origin(base))


def read_config(path: str | os.PathLike[str]) -> LoRAConfig:
    """The LoRAConfig of a PEFT folder. Raises UserError for what is missing, or asks for other arithmetic."""
    where = Path(path) / "adapter_config.json"
    raw = read_json(where, LONGEST_CONFIG) if where.exists() else {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: not a JSON object; the adapter is corrupt")
    if raw.get("peft_type") != "LORA":
        if "peft_type" not in raw:
            adapter_file(path)  # refuses other programs' adapters by name
        raise UserError(f"{where}: peft_type is not LORA; only LoRA adapters are covered")
    for key, value in raw.items():
        if key in LIMITED:
            values, remedy = LIMITED[key]
            if value not in values:
                raise UserError(f"{where}: {key} {value!r} is not covered; {remedy}")
        elif key in REFUSED:
            if value:
                raise UserError(f"{where}: {key} is not covered; it changes what the adapter computes")
        elif key in READ or key in HARMLESS or value in (None, False, {}, []):
            continue
        elif isinstance(value, (int, float)) and not isinstance(value, bool):  # a later PEFT writes its defaults too
            warnings.warn(f"{where}: unknown field {key!r} = {value!r} is ignored, as PEFT does", stacklevel=2)
        else:
            raise UserError(f"{where}: unknown field {key!r}; what it asks for is not covered")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    try:
        return config_from(raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a field holds another kind of value than PEFT writes ({error})") from error


def config_from(raw: dict[str, Any]) -> LoRAConfig:
    """The LoRAConfig of adapter_config.json's fields."""
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


class AdapterFile(Mapping[str, Tensor]):
    """The tensors of a PEFT folder by PEFT's keys, each read when it is asked for and not kept.

    Raises UserError where the file is missing or corrupt. Keys that kept the adapter's name (`lora_A.default.weight`)
    are without it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        found = open_safetensors(adapter_file(path))
        self.stored = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key): value for key, value in found.items()}
        if len(self.stored) != len(found):
            raise UserError(f"{path}: holds a matrix with and without the adapter's name; the file is corrupt")

    def shape(self, key: str) -> tuple[int, ...]:
        return self.stored[key].shape

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[key].read(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def adapted_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the modules whose A matrix is among `tensors`."""
    suffix = ".lora_A.weight"
    return [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]


def matrices(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """(a_RD, b_OR) of a module."""
    return tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"]


def update_rows(a_RD: Tensor, b_OR: Tensor, scale: float, rows: slice | None, dtype: torch.dtype) -> Tensor:
    """Rows of s·B A in `dtype`, all of them for None."""
    b_PR = b_OR if rows is None else b_OR[rows]
    return (b_PR.to(dtype) @ a_RD.to(dtype)).mul_(scale)


def fitted(config: LoRAConfig, model: nn.Module) -> LoRAConfig:
    """The config of an adapter that was loaded, without target names that this model lacks."""
    if isinstance(config.target_modules, str):
        return config
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    kept = tuple(name for name in config.target_modules if any(ends_in(path, name) for path in linears))
    return replace(config, target_modules=kept or config.target_modules)


def load_adapter(model: Model, path: str | os.PathLike[str], name: str = "default") -> Model:
    """Load PEFT's files onto `model` in place as an active, trainable adapter. Returns the model.

    Raises UserError where the files are corrupt, belong to another model, or ask for what is not covered.
    """
    config, tensors = fitted(read_config(path), model), AdapterFile(path)
    check_tensors(model, tensors, config, path)
    add_lora(model, config, name)
    with torch.no_grad():
        rotation = getattr(model, "rotation", None)  # model/quantize/rotation.py
        for module, layer in adapted(model).items():
            if name in layer.scale:
                a_RD, b_OR = matrices(tensors, module)
                if rotation is not None:
                    a_RD, b_OR = rotation.turn_adapter(module, a_RD, b_OR)
                layer.lora_A[name].copy_(a_RD)
                layer.lora_B[name].copy_(b_OR)
    return model


def check_tensors(
    model: nn.Module,
    tensors: AdapterFile,
    config: LoRAConfig,
    path: str | os.PathLike[str],
    base: Checkpoint | None = None,
) -> None:
    """Every adapter tensor has its module, every module its tensors, all shapes agree and all numbers are finite; else
    a UserError. Shapes come before any reading: a file may claim any size. A copy of a weight of the base has to be
    that weight, in `base` or, without it, in the model."""
    expected = {}
    for module, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and config.wants(module):
            rank = config.rank(module)
            expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, linear.in_features)
            expected[f"{PREFIX}{module}.lora_B.weight"] = (linear.out_features, rank)
    surplus, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    copies = {}
    for key in surplus:
        if ".lm_head.lora_" in key:
            raise UserError(f"{path}: holds {key!r}, and an adapter on lm_head is not covered; merge it with peft")
        name = copied_name(model, key)
        if ".lora_" in key or weight_shape(model, base, name) != tensors.shape(key):
            raise UserError(f"{path}: holds {key!r}, which this model has no place for; it was made for another model")
        copies[key] = name
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}; it was made for another model or other target modules")
    for key, shape in expected.items():
        if tensors.shape(key) != shape:
            raise UserError(f"{path}: {key} is {tensors.shape(key)}, not {shape}; it was made for another model")
        if not tensors[key].isfinite().all():
            raise UserError(f"{path}: {key} holds values that are not finite; the file is corrupt")
    for key, name in copies.items():
        weight = base.read(name) if base is not None else model.get_parameter(name).detach()
        if weight.is_meta or not torch.equal(tensors[key].to(weight.device, weight.dtype), weight):
            raise UserError(
                f"{path}: {key} is not the base's {name}: it was trained too (modules_to_save or biases), "
                "which is not covered; merge the adapter with peft"
            )


def copied_name(model: nn.Module, key: str) -> str:
    """The weight of the base that a key without lora_A or lora_B names."""
    name = re.sub(r"\.(base_layer|modules_to_save)(\.default)?\.", ".", key.removeprefix(PREFIX))
    is_tied = getattr(model, "lm_head", model) is None
    return "model.embed_tokens.weight" if is_tied and name == "lm_head.weight" else name


def weight_shape(model: nn.Module, base: Checkpoint | None, name: str) -> tuple[int, ...] | None:
    """The shape of a weight of the base, None where it has none of this name."""
    if base is not None:
        return base.tensors[name].shape if name in base.tensors else None
    found = dict(model.named_parameters()).get(name)
    return None if found is None else tuple(found.shape)
