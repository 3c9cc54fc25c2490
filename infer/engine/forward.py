"""Inference forward pass: same arithmetic as model/transformer.py with fused projections and fewer dispatches.

What makes it fast:

* q, k and v are one GEMM, and so are gate and up. Decoding is bound by reading the weights, and one large matrix is
  read at a higher rate than three small ones. The model's parameters become views of the fused matrix: no copy.
* Tokens of all requests are concatenated (x_ND, no padding); only attention distinguishes requests.
* Residual sums are part of the GEMM (addmm); a norm is one call, rotary embedding three.
* fp32 GEMMs on a CPU use oneDNN if torch's default library is not made for the processor.
* Logits are computed only where they are needed: one position per request.

Unmerged LoRA adapters are applied separately and exactly, those of a fused projection as one product. Experts and other
modules that are not linear layers are called as they are. A model of `FusedBlock`s (fuse.py) runs on kernels instead:
FusedBlock has the same three steps as Layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.engine.fuse import FusedBlock
from lora.layer import LoRALinear
from model.quantize.linear import QuantizedWeight
from model.support.hardware import onednn, product, use_onednn
from model.transformer import Block, RMSNorm, Transformer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PackedLinear:
    """Linear layers with the same input as one GEMM: y = x · [W1; W2; …]ᵀ. Reads the modules' weights on
    construction."""

    def __init__(self, modules: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.quantized: QuantizedWeight | None = None
        self.adapter: tuple[Tensor, Tensor] | None = None  # a_DR of all layers concatenated, block-diagonal b_RO
        quantized = [getattr(module, "quantized", None) for module in modules]
        quantized_weights = [weight for weight in quantized if isinstance(weight, QuantizedWeight)]
        if len(quantized_weights) == len(modules):
            self.quantized = joined(quantized_weights)
        elif all(type(module) in (nn.Linear, LoRALinear) and module.weight is not None for module in modules):
            weights = [module.weight.detach() for module in modules]
            self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if self.weight is None and self.quantized is None:
            return
        if any(module.bias is not None for module in modules):
            self.bias = torch.cat([module.bias.detach() for module in modules])  # all modules have one or none has
        start, adapters = 0, []
        for module in modules:
            rows = slice(start, start + module.out_features)
            start = rows.stop
            if self.weight is not None and len(modules) > 1:
                module.weight.data = self.weight[rows]  # a view: no copy
            if isinstance(module, LoRALinear) and module.active is not None and module.original is None:
                a_RD, b_OR = module.lora_A[module.active].detach(), module.lora_B[module.active].detach()
                adapters.append((rows, a_RD.to(dtype), (b_OR * module.scale[module.active]).to(dtype)))
        if adapters:
            a_RD = torch.cat([a_RD for _, a_RD, _ in adapters])
            b_OR, rank = a_RD.new_zeros(start, len(a_RD)), 0
            for rows, part_RD, part_OR in adapters:
                b_OR[rows, rank : rank + len(part_RD)] = part_OR
                rank += len(part_RD)
            self.adapter = a_RD.t(), b_OR.t()

    def __call__(self, x_ND: Tensor) -> Tensor:
        if self.quantized is not None:
            y_NO = self.quantized.product(x_ND)
            return self.adapt(x_ND, y_NO if self.bias is None else y_NO.add_(self.bias))
        if self.weight is None:
            parts = [module(x_ND) for module in self.modules]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return self.adapt(x_ND, product(x_ND, self.weight, self.bias))

    def add_to(self, residual_ND: Tensor, x_ND: Tensor) -> Tensor:
        """residual + y."""
        if self.weight is None or self.bias is not None:
            return residual_ND + self(x_ND)
        if use_onednn(x_ND, self.weight):
            return self.adapt(x_ND, onednn(x_ND, self.weight).add_(residual_ND))
        if x_ND.shape[0] == 1:  # GEMV reads the weights faster than GEMM
            return self.adapt(x_ND, torch.addmv(residual_ND[0], self.weight, x_ND[0])[None])
        return self.adapt(x_ND, torch.addmm(residual_ND, x_ND, self.weight.t()))

    def adapt(self, x_ND: Tensor, y_NO: Tensor) -> Tensor:
        if self.adapter is None:
            return y_NO
        a_DR, b_RO = self.adapter
        return y_NO.addmm_(x_ND @ a_DR, b_RO)


def joined(weights: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Quantized weights concatenated; None if formats differ, or for nf4 (scales quantized per matrix)."""
    if len(weights) == 1:
        return weights[0]
    same = len({(weight.kind, weight.group, weight.packed) for weight in weights}) == 1
    return QuantizedWeight.join(weights) if same and weights[0].kind != "nf4" else None


class Norm:
    """Eager RMSNorm on a CPU (fewer dispatches; bf16 is rounded once, at the end); the module's forward otherwise."""

    def __init__(self, norm: RMSNorm) -> None:
        self.norm, self.eps = norm, norm.eps
        weight = norm.weight.detach()
        self.narrow = weight.dtype == torch.bfloat16
        self.direct = weight.device.type == "cpu" and (self.narrow or weight.dtype in (torch.float32, torch.float64))
        self.weight = weight.float() if self.narrow else weight

    def __call__(self, x_ND: Tensor) -> Tensor:
        if not self.direct:
            return self.norm(x_ND)
        wide_ND = x_ND.float() if self.narrow else x_ND
        length_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True)
        if len(x_ND) == 1 and not torch.compiler.is_compiling():  # Python's float arithmetic beats four tensor calls
            y_ND = (wide_ND * self.weight).mul_((length_N1.item() ** 2 / x_ND.shape[-1] + self.eps) ** -0.5)
        else:
            inverse_N1 = length_N1.square_().div_(x_ND.shape[-1]).add_(self.eps).rsqrt_()
            y_ND = (wide_ND * inverse_N1).mul_(self.weight)
        return y_ND.bfloat16() if self.narrow else y_ND


class Layer:
    """A block's projections and norms; attention is computed by the caller."""

    def __init__(self, block: Block) -> None:
        attention, dtype = block.self_attn, block.input_layernorm.weight.dtype
        self.norm, self.ffn_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = PackedLinear([attention.o_proj], dtype)
        self.window = attention.window
        self.experts = getattr(block, "block_sparse_moe", None)
        if self.experts is None:
            self.gate_up = PackedLinear([block.mlp.gate_proj, block.mlp.up_proj], dtype)
            self.down = PackedLinear([block.mlp.down_proj], dtype)

    def project(self, x_ND: Tensor) -> Tensor:
        return self.qkv(self.norm(x_ND))

    def add_attention(self, x_ND: Tensor, out_ND: Tensor) -> Tensor:
        return self.out.add_to(x_ND, out_ND)

    def add_feed_forward(self, x_ND: Tensor) -> Tensor:
        n_ND = self.ffn_norm(x_ND)
        if self.experts is not None:
            return x_ND + self.experts(n_ND[None])[0]
        gate_NF, up_NF = self.gate_up(n_ND).chunk(2, dim=-1)
        return self.down.add_to(x_ND, F.silu(gate_NF).mul_(up_NF))


class Engine:
    """A Transformer prepared for inference. Weights are read on construction: make a new Engine after changing them.

    `cache_dtype` is the dtype of keys and values (None: the model's); prefill takes `chunk` tokens at a time.
    """

    def __init__(self, model: Transformer, cache_dtype: torch.dtype | None = None, chunk: int = 2048) -> None:
        self.model, self.config = model, model.config
        self.head_dim = model.config.head_dim
        self.fused = isinstance(model.model.layers[0], FusedBlock)
        self.layers = [block if isinstance(block, FusedBlock) else Layer(block) for block in model.model.layers]
        self.norm = Norm(model.model.norm)
        self.heads, self.groups = model.config.num_attention_heads, model.config.num_key_value_heads
        self.scale = self.head_dim**-0.5
        self.dtype, self.device = model.dtype, model.device
        self.cache_dtype, self.chunk = cache_dtype or model.dtype, chunk
        head = model.lm_head if model.lm_head is not None else model.model.embed_tokens
        plain = type(head) in (nn.Linear, nn.Embedding) and type(head.weight.data) is Tensor
        self.head_weight = head.weight.detach() if plain else None  # None: call the head's module

    def rotary(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos_N1K and sin_N1K of positions, for rotated = x · cos + swapped halves · sin: the first half of sin is
        negated."""
        cos_1NK, sin_1NK = self.model.model.rotary(position_N[None], self.dtype)
        sin_N1K = sin_1NK[0, :, None].clone()
        sin_N1K[..., : self.head_dim // 2].neg_()
        return cos_1NK[0, :, None], sin_N1K

    def forward(
        self, tokens_N: Tensor, position_N: Tensor, attend: Attend, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Final normed hidden states x_ND of tokens at the given positions (int64). `attend(layer, q_NHK, k_NGK,
        v_NGK)` must store the new keys and values and return out_NHK. `rotary`: what `rotary(position_N)` returns."""
        N, H, G, K = len(tokens_N), self.heads, self.groups, self.head_dim
        x_ND = self.model.model.embed_tokens(tokens_N)
        cos_N1K, sin_N1K = rotary or self.rotary(position_N)
        for number, layer in enumerate(self.layers):
            qkv_NHK = layer.project(x_ND).view(N, H + 2 * G, K)
            qk_NHK, v_NGK = qkv_NHK[:, : H + G], qkv_NHK[:, H + G :]
            qk_NHK = torch.addcmul(qk_NHK * cos_N1K, qk_NHK.roll(K // 2, -1), sin_N1K)
            out_NHK = attend(number, qk_NHK[:, :H], qk_NHK[:, H:], v_NGK)
            x_ND = layer.add_attention(x_ND, out_NHK.reshape(N, H * K))
            x_ND = layer.add_feed_forward(x_ND)
        return self.norm(x_ND)

    def logits(self, x_ND: Tensor) -> Tensor:
        """logits_NV in at least fp32."""
        if self.head_weight is not None and use_onednn(x_ND, self.head_weight):
            return onednn(x_ND, self.head_weight)
        return self.model.head(x_ND)
