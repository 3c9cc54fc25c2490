"""PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, in both directions.

Keys are `base_model.model.` + the module's name + `.lora_A.weight` (R × in) or `.lora_B.weight` (out × R). PEFT loads
them non-strictly. Here a missing, unexpected or misshapen tensor is an error, and so is a config field that would
change the arithmetic. Unchanged copies of base weights and target names that the model lacks are ignored.
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
MAX_CONFIG_BYTES = 2**20  # of adapter_config.json
# Fields that PEFT 0.21 may write: read; without effect on loaded tensors; refused unless empty.
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
# Initializations that do not change the base weights. The others (pissa, olora, corda, loftq, lora_ga, mica) do, so
# that their A and B are wrong for the original base.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Field → (supported values, what to do about any other).
LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": ((None, "none", "all", "lora_only"), "train the adapter with bias 'none'"),
    "init_lora_weights": (
        INITIALIZATIONS,
        "it changes the base weights; save the adapter converted to plain LoRA",
    ),
    "layers_pattern": ((None, "", "layers", [], ["layers"]), "the layers of these models are called 'layers'"),
}


def adapter_state(
    model: nn.Module, name: str = "default", params: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys. `params`: gathered parameters by name, if the model's are sharded."""
    held = dict(model.named_parameters()) if params is None else params
    return {
        f"{PREFIX}{path}.{kind}.weight": held[f"{path}.{kind}.{name}"].detach()
        for path, layer in adapted(model).items()
        if name in layer.scale
        for kind in ("lora_A", "lora_B")
    }


def peft_config(config: LoRAConfig, base: str | None, modules: list[str]) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter on these modules."""
    targets, layers, exclude = config.target_modules, config.layers, config.exclude_modules
    if isinstance(targets, str) and layers is not None:  # PEFT accepts layers only with a list of names
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
    """Write an adapter as PEFT does, atomically; other files in an existing folder stay. `base`: the path of the base
    weights, recorded in the config."""
    configs = model.__dict__.get("lora_configs", {})
    if name not in configs:
        raise UserError(f"lora: the model has no adapter called {name!r}{nearest(name, list(configs))}")
    with atomic_folder(path, keep_others=True) as folder:
        write_adapter(folder, configs[name], adapter_state(model, name), base)


def write_adapter(
    folder: Path, config: LoRAConfig, state: dict[str, Tensor], base: str | os.PathLike[str] | None = None
) -> None:
    """Write PEFT's two files into an existing folder, and trained_on.json if `base` exists."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in sorted(state.items())}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    modules = adapted_modules(tensors)
    write_json(folder / "adapter_config.json", peft_config(config, None if base is None else str(base), modules))
    if base and Path(base).exists():
        write_json(folder / TRAINED_ON, origin(base))


def read_config(path: str | os.PathLike[str]) -> LoRAConfig:
    """The LoRAConfig of a PEFT folder. Raises UserError for missing fields and fields that change the arithmetic."""
    where = Path(path) / "adapter_config.json"
    raw = read_json(where, MAX_CONFIG_BYTES) if where.exists() else {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: not a JSON object; the adapter is corrupt")
    if raw.get("peft_type") != "LORA":
        if "peft_type" not in raw:
            adapter_file(path)  # names the format if it is another program's adapter
        raise UserError(f"{where}: peft_type is not LORA; only LoRA adapters are supported")
    for key, value in raw.items():
        if key in LIMITED:
            values, remedy = LIMITED[key]
            if value not in values:
                raise UserError(f"{where}: {key} {value!r} is not supported; {remedy}")
        elif key in REFUSED:
            if value:
                raise UserError(f"{where}: {key} is not supported; it changes what the adapter computes")
        elif key in READ or key in HARMLESS or value in (None, False, {}, []):
            continue
        elif isinstance(value, (int, float)) and not isinstance(value, bool):  # a default of a newer PEFT
            warnings.warn(f"{where}: unknown field {key!r} = {value!r} is ignored, as PEFT does", stacklevel=2)
        else:
            raise UserError(f"{where}: unknown field {key!r} is not supported")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    try:
        return config_from(raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a field has the wrong type ({error}); the adapter is corrupt") from error


def config_from(raw: dict[str, Any]) -> LoRAConfig:
    """The LoRAConfig of an adapter_config.json."""
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
    """The tensors of a PEFT folder by PEFT's keys, each read from disk on access.

    The adapter's name is removed from keys (`lora_A.default.weight` → `lora_A.weight`). Raises UserError for a missing
    or corrupt file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        found = open_safetensors(adapter_file(path))
        self.stored = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key): value for key, value in found.items()}
        if len(self.stored) != len(found):
            raise UserError(f"{path}: a key occurs with and without the adapter's name; the file is corrupt")

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
    """Rows (None: all) of s·B A in `dtype`."""
    b_PR = b_OR if rows is None else b_OR[rows]
    return (b_PR.to(dtype) @ a_RD.to(dtype)).mul_(scale)


def drop_absent_targets(config: LoRAConfig, model: nn.Module) -> LoRAConfig:
    """The config without target names that match no linear layer of `model`."""
    if isinstance(config.target_modules, str):
        return config
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    kept = tuple(name for name in config.target_modules if any(ends_in(path, name) for path in linears))
    return replace(config, target_modules=kept or config.target_modules)


def load_adapter(model: Model, path: str | os.PathLike[str], name: str = "default") -> Model:
    """Load PEFT's files onto `model` in place as an active, trainable adapter. Returns the model.

    Raises UserError if the files are corrupt, belong to another model, or use an unsupported option.
    """
    config, tensors = drop_absent_targets(read_config(path), model), AdapterFile(path)
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
    """Check an adapter's tensors against the model. Raises UserError for the first problem.

    Exactly the tensors that `config` selects must be there, with the right shapes and finite values. Shapes are checked
    before anything is read, since a file may claim any size. A copy of a base weight must equal that weight in `base`
    or, if None, in the model.
    """
    expected = expected_shapes(model, config)
    copies = {}  # key → name of the base weight
    for key in sorted(tensors.keys() - expected.keys()):
        if ".lm_head.lora_" in key:
            raise UserError(f"{path}: holds {key!r}, and an adapter on lm_head is not supported; merge it with peft")
        name = copied_weight(model, key)
        if ".lora_" in key or weight_shape(model, base, name) != tensors.shape(key):
            raise UserError(f"{path}: holds {key!r}, which this model has no place for; it was made for another model")
        copies[key] = name
    if missing := sorted(expected.keys() - tensors.keys()):
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
                "which is not supported; merge the adapter with peft"
            )


def expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, int]]:
    """The shapes of an adapter's tensors by PEFT's keys."""
    shapes = {}
    for module, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and config.wants(module):
            rank = config.rank(module)
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (rank, linear.in_features)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


def copied_weight(model: nn.Module, key: str) -> str:
    """The name of the base weight that an adapter file's key without lora_A or lora_B is a copy of."""
    name = re.sub(r"\.(base_layer|modules_to_save)(\.default)?\.", ".", key.removeprefix(PREFIX))
    is_tied = getattr(model, "lm_head", model) is None
    return "model.embed_tokens.weight" if is_tied and name == "lm_head.weight" else name


def weight_shape(model: nn.Module, base: Checkpoint | None, name: str) -> tuple[int, ...] | None:
    """The shape of a weight of `base` (None: of the model), or None if it has no weight of this name."""
    if base is not None:
        return base.tensors[name].shape if name in base.tensors else None
    found = dict(model.named_parameters()).get(name)
    return None if found is None else tuple(found.shape)
