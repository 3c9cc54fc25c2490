"""Fold rotations into a model's weights: the same function, with activations that quantize better to 8 bits.

A few channels of the residual stream are far larger than the rest, and a token's 8-bit scale follows the largest. In a
rotated basis every coordinate mixes all channels, so there are no outliers (QuaRot, arXiv 2404.00456). The algebra,
explained in docs/quantization.md:

    gains     W · (g ∘ n)  =  (W diag(g)) · n            a norm's gain g moves into the matrices that read the norm
    stream    x' = x Q     embedding E Q;  readers W diag(g) Q;  writers Qᵀ W;  |x'| = |x|, so norms see no difference
    values    v' = v R     for each key/value head: v_proj's rows Rᵀ W, o_proj's columns W R
    adapters  W + B A      A is rotated as W's columns, B as W's rows

Q and R are orthogonal matrices with a fast product: random signs, then a Kronecker product of two Hadamard matrices
(times a cosine transform, for the odd part of a size).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import RMSNorm, Transformer


@cache
def kronecker_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthogonal A (a × a) and B (b × b) with a · b = size and a, b as close to each other as possible."""
    a = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    left, right = (orthogonal(count).to(device, dtype) for count in (a, size // a))
    return left, right


def orthogonal(size: int) -> Tensor:
    """Hadamard matrix of the largest power of two in `size` ⊗ cosine transform of the odd part, in fp64."""
    power = size & -size
    return torch.kron(hadamard(power), cosines(size // power))


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, normalized by 1/√size; `size` is a power of two."""
    matrix, double = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, double)
    return matrix / math.sqrt(size)


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform: column k holds cos(π (j + ½) k / size)."""
    step = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (step[:, None] + 0.5) * step) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def mix(x: Tensor) -> Tensor:
    """x · (A ⊗ B) over the last dimension, computed as Aᵀ X B with x as an a × b matrix X: a + b multiplications for
    each number instead of a · b."""
    a_aa, b_bb = kronecker_factors(x.shape[-1], x.dtype, x.device)
    return torch.matmul(a_aa.t(), x.unflatten(-1, (len(a_aa), -1)) @ b_bb).flatten(-2)


def unmix(x: Tensor) -> Tensor:
    """x · (A ⊗ B)ᵀ over the last dimension: the inverse of `mix`."""
    a_aa, b_bb = kronecker_factors(x.shape[-1], x.dtype, x.device)
    return torch.matmul(a_aa, x.unflatten(-1, (len(a_aa), -1)) @ b_bb.t()).flatten(-2)


def turn(x: Tensor, signs: Tensor) -> Tensor:
    """x · diag(signs) · (A ⊗ B), over the last dimension."""
    return mix(x * signs.to(x))


class Rotation:
    """The rotation of a model. `gain(name)` returns the original weight of the norm of that name.

    The weight W of layer `path` becomes `rows(path, columns(path, W))`. `columns` treats rows independently, so it can
    be applied to part of a matrix; `rows` needs all rows if `mixes_rows(path)`.
    """

    def __init__(self, config: ModelConfig, gain: Callable[[str], Tensor], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config, self.gain = config, gain
        self.stream_D = signs((config.hidden_size,), generator)
        self.value_GK = signs((config.num_key_value_heads, config.head_dim), generator)

    def columns(self, path: str, weight_MD: Tensor) -> Tensor:
        """W diag(g) Q for a matrix that reads the stream (E Q for the embedding), W R for o_proj, else W, in at least
        fp32."""
        wide_MD, leaf = weight_MD.to(torch.promote_types(weight_MD.dtype, torch.float32)), path.rpartition(".")[2]
        if mixes_inputs(path):
            return wide_MD
        if leaf == "o_proj":
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            signs_HK = self.value_GK.repeat_interleave(group, dim=0)
            return turn(wide_MD.unflatten(1, signs_HK.shape), signs_HK).flatten(1)
        norm = norm_before(path)
        if norm is not None:
            wide_MD = wide_MD * self.gain(norm).to(wide_MD)
        return turn(wide_MD, self.stream_D)

    def rows(self, path: str, weight_OM: Tensor) -> Tensor:
        """Qᵀ W for a matrix that writes to the stream, Rᵀ W for v_proj, else W."""
        if not mixes_rows(path):
            return weight_OM
        if path.endswith("v_proj"):
            return turn(weight_OM.t().unflatten(1, self.value_GK.shape), self.value_GK).flatten(1).t()
        turned_OM = torch.empty_like(weight_OM)
        for columns in range(0, weight_OM.shape[1], 512):  # in parts, so that temporaries stay small
            part = slice(columns, columns + 512)
            turned_OM[:, part] = turn(weight_OM[:, part].t(), self.stream_D).t()
        return turned_OM

    def turn_adapter(self, path: str, a_RD: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """An adapter's A and B for the rotated layer."""
        return self.columns(path, a_RD).to(a_RD.dtype), self.rows(path, b_OR)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Rotate the parameters that are not quantized (routers, biases of v_proj, o_proj); set norm weights to 1."""
        for path, module in model.named_modules():
            if path.endswith("block_sparse_moe.gate"):
                module.weight.copy_(self.columns(path, module.weight))
            elif mixes_rows(path) and getattr(module, "bias", None) is not None:
                module.bias.copy_(self.rows(path, module.bias[:, None])[:, 0])
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
        model.rotation = self  # type: ignore[assignment]  # for adapters that are loaded later


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(torch.float64)


def mixes_rows(path: str) -> bool:
    """True if the layer's output is rotated: it writes to the stream or computes values."""
    return path.endswith((".o_proj", ".down_proj", ".w2", ".v_proj"))


def mixes_inputs(path: str) -> bool:
    """True if the layer reads silu(gate) · up: silu is elementwise, so that basis cannot be rotated."""
    return path.endswith((".down_proj", ".w2"))


def norm_before(path: str) -> str | None:
    """Name of the weight of the norm whose output the layer reads; None for the embedding."""
    if path == "lm_head":
        return "model.norm.weight"
    block = re.match(r"model\.layers\.\d+", path)
    if block is None:
        return None
    return f"{block[0]}.{'input' if '.self_attn.' in path else 'post_attention'}_layernorm.weight"


@torch.no_grad()
def rotate(model: Transformer, seed: int = 0) -> Transformer:
    """Rotate a model in place and return it. Its function is unchanged up to rounding; a tied head is untied.

    Adapters on its layers are rotated too, now and when lora.load_adapter loads them later. Raises ValueError if the
    model is already rotated, a layer is quantized, or an adapter is merged that can still be unmerged.
    """
    if getattr(model, "rotation", None) is not None:
        raise ValueError("the model is rotated already")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (module.weight is None or getattr(module, "original", None) is not None):
            raise ValueError(f"{path}: rotate before quantizing and before merging an adapter that is kept")
    if model.lm_head is None:
        model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone(), requires_grad=False)
        model.config = model.model.config = replace(model.config, tie_word_embeddings=False)
    gains = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("norm.weight")}
    rotation = Rotation(model.config, gains.__getitem__, seed)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and not path.endswith("block_sparse_moe.gate"):
            module.weight.copy_(rotation.rows(path, rotation.columns(path, module.weight)))
        for name in getattr(module, "lora_A", ()):
            a_RD, b_OR = module.lora_A[name], module.lora_B[name]
            for old, new in zip((a_RD, b_OR), rotation.turn_adapter(path, a_RD, b_OR), strict=True):
                old.copy_(new)
    rotation.finish(model)
    return model
