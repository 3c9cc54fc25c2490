"""Report what an adapter changes in each layer: `python -m lora.audit --adapter DIR [--weights DIR]`.

For ΔW = s·B A: its norm, its largest singular values, and its effective rank exp(−Σ p ln p) with p = σ/Σσ (Roy &
Vetterli 2007). They come from QR decompositions of A and B; ΔW itself is not decomposed. With the base's weights also
‖ΔW‖/‖W‖, and the error of a merge in bf16: ‖bf16(W + ΔW) − (bf16(W) + ΔW)‖/‖ΔW‖.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora.peft import PREFIX, AdapterFile, adapted_modules, matrices, read_config, update_rows
from model.checkpoints.weights import Checkpoint, open_checkpoint
from model.support.cli import UserError, run
from model.support.files import atomic_file
from model.support.lock import output


@dataclass(frozen=True)
class Options:
    """Per-module audit of an adapter."""

    adapter: str
    """The adapter's folder."""
    weights: str = ""
    """The base it was trained on (empty: report on the adapter alone)."""
    heat_map: str = ""
    """Write a heat map of the norms (with --weights: ‖ΔW‖/‖W‖), layers × modules, as a PNG."""
    overwrite: bool = False
    """Replace a picture that is there."""
    json: bool = False
    """Print JSON instead of a table."""


def singular_values(a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The R singular values of s·B A in fp64: with B = Q_B R_B and Aᵀ = Q_A R_A, those of s·R_B R_Aᵀ (R × R)."""
    r_b = torch.linalg.qr(b_OR.double()).R
    r_a = torch.linalg.qr(a_RD.double().T).R
    return torch.linalg.svdvals(r_b @ r_a.T) * scale


def effective_rank(sigma_R: Tensor) -> float:
    p_R = sigma_R[sigma_R > 0] / sigma_R.sum()
    return float(torch.exp(-(p_R * p_R.log()).sum())) if len(p_R) else 0.0


def audit(adapter: str, weights: str = "") -> list[dict[str, Any]]:
    """One row for each module, in order of layers. Raises UserError if files are missing, corrupt or mismatched."""
    config, tensors = read_config(adapter), AdapterFile(adapter)
    base = open_checkpoint(weights) if weights else None
    rows = []
    for module in tqdm(adapted_modules(tensors), disable=None, leave=False):
        if f"{PREFIX}{module}.lora_B.weight" not in tensors:
            raise UserError(f"{adapter}: lacks the lora_B of {module}; the adapter is corrupt")
        a_RD, b_OR = matrices(tensors, module)
        if not (a_RD.isfinite().all() and b_OR.isfinite().all()) or a_RD.shape[:1] != b_OR.shape[1:]:
            raise UserError(f"{adapter}: {module} holds values that are not finite, or A and B of different ranks")
        sigma_R = singular_values(a_RD, b_OR, config.scale(module))
        row = {
            "module": module,
            "rank": len(a_RD),
            "norm": float(sigma_R.norm()),
            "effective_rank": effective_rank(sigma_R),
            "top": [float(value) for value in sigma_R[:4]],
        }
        if base is not None:
            row |= compare_with_base(base, f"{module}.weight", a_RD, b_OR, config.scale(module))
        rows.append(row)
    if not rows:
        raise UserError(f"{adapter}: holds no adapter's matrices; it is empty")
    layer_number = re.compile(r"\.(\d+)\.")
    return sorted(rows, key=lambda row: (int((layer_number.search(row["module"]) or [0, -1])[1]), row["module"]))


def compare_with_base(base: Checkpoint, name: str, a_RD: Tensor, b_OR: Tensor, scale: float) -> dict[str, float | None]:
    """‖ΔW‖/‖W‖ (None if W = 0) and the error of a bf16 merge; W is streamed."""
    if name not in base.tensors or base.tensors[name].shape != (len(b_OR), a_RD.shape[1]):
        raise UserError(f"{base.path}: lacks {name} of the adapter's shape; the adapter was made for another model")
    weight, update, lost = 0.0, 0.0, 0.0  # sums of squares: W, ΔW, rounding error of the merge
    for rows, piece in base.stream(name):
        delta_PD = update_rows(a_RD, b_OR, scale, rows, torch.float32)
        exact_PD = piece.bfloat16().float() + delta_PD
        weight += float(piece.double().square().sum())
        update += float(delta_PD.double().square().sum())
        lost += float((exact_PD.bfloat16().float() - exact_PD).double().square().sum())
    return {
        "relative_norm": (update / weight) ** 0.5 if weight else None,
        "bf16_distortion": (lost / update) ** 0.5 if update else 0.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'module':44} {'rank':>4} {'‖ΔW‖':>9} {'‖ΔW‖/‖W‖':>10} {'eff. rank':>9} {'bf16 loss':>9}  top singular"]
    for row in rows:
        values = (row.get(key) for key in ("relative_norm", "bf16_distortion"))
        relative, lost = ("–" if value is None else f"{value:.4f}" for value in values)
        top = " ".join(f"{value:.3g}" for value in row["top"])
        lines.append(
            f"{row['module']:44} {row['rank']:4} {row['norm']:9.4f} {relative:>10} "
            f"{row['effective_rank']:9.2f} {lost:>9}  {top}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Write the heat map: a row for each layer, a column for each kind of module."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError(f"{path}: no heat map: matplotlib is not installed (pip install matplotlib)") from error

    found = [(int(m[1]), m[2], row) for row in rows if (m := re.search(r"\.layers\.(\d+)\.(.+)", row["module"]))]
    if not found:
        raise UserError(f"{path}: no heat map: none of the adapter's modules is in a numbered layer")
    layers, kinds = sorted({layer for layer, _, _ in found}), sorted({kind for _, kind, _ in found})
    values = torch.full((len(layers), len(kinds)), float("nan"))
    for layer, kind, row in found:
        value = row.get("relative_norm", row["norm"])
        values[layers.index(layer), kinds.index(kind)] = float("nan") if value is None else value
    figure, axes = plt.subplots(figsize=(1.2 * len(kinds) + 2, 0.25 * len(layers) + 2))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds], rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    figure.colorbar(image, label="‖ΔW‖/‖W‖" if "relative_norm" in rows[0] else "‖ΔW‖")
    figure.tight_layout()
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main(options: Options) -> int:
    rows = audit(options.adapter, options.weights)
    print(json.dumps(rows, indent=2) if options.json else table(rows))
    if options.heat_map:
        with output(options.heat_map, options.overwrite, options.adapter):
            draw(rows, options.heat_map)
    return 0


if __name__ == "__main__":
    run(main, Options)
