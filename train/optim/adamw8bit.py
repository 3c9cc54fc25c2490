"""AdamW with blockwise 8-bit moments (arXiv 2110.02861), in plain PyTorch.

Each step dequantizes a parameter's moments, takes AdamW's step in fp32, and quantizes them again. A block is 256
consecutive values of one row (fewer at a row's end). If the width is a multiple of 256 these are bitsandbytes' blocks.
No block spans two rows, so sharding by rows changes no bit. Vectors, and matrices of fewer than 4,096 values, keep fp32
moments. The state is not paged to host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.quantize.blockwise import dequantize, dynamic_table, quantize
from train.distributed.sharding import local, sharded_like

BLOCK = 256  # values that share one absmax
MIN_QUANTIZED = 4096  # matrices with fewer values keep fp32 moments


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW with 8-bit moments (decoupled weight decay, eps outside the square root)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.tables = {"mean": dynamic_table(signed=True), "square": dynamic_table(signed=False)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group)

    def update(self, param: Tensor, group: dict[str, Any]) -> None:
        """AdamW's step on this rank's rows of one parameter."""
        state, mine = self.state[param], local(param)
        mean, square = self.read(state, "mean", mine), self.read(state, "square", mine)
        state["step"] = state.get("step", torch.zeros(())) + 1
        beta1, beta2 = group["betas"]
        assert param.grad is not None
        grad, t = local(param.grad).to(mean.dtype), float(state["step"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        mine.mul_(1 - group["lr"] * group["weight_decay"])
        mine.addcdiv_(mean.to(mine.dtype), root.to(mine.dtype), value=-group["lr"] / (1 - beta1**t))
        self.write(state, "mean", mean, param)
        self.write(state, "square", square, param)

    def read(self, state: dict[str, Any], name: str, mine: Tensor) -> Tensor:
        """The moment `name` of this rank's rows in fp32 (zeros before the first step)."""
        if name in state:
            return local(state[name])
        if f"{name}_codes" in state:
            codes, absmax = local(state[f"{name}_codes"]), local(state[f"{name}_absmax"])
            rows, width = len(codes), codes.shape[1]  # whole blocks: rows are padded with zeros
            flat = dequantize(codes.flatten(), absmax.flatten(), self.tables[name], block_of(mine.shape[1]))
            return flat.view(rows, width)[:, : mine.shape[1]].contiguous()
        return torch.zeros_like(mine, dtype=torch.float32)

    def write(self, state: dict[str, Any], name: str, value: Tensor, param: Tensor) -> None:
        """Stores the moment `name`: quantized for large matrices, else in fp32."""
        if param.dim() != 2 or param.numel() < MIN_QUANTIZED:
            state[name] = sharded_like(value, param, param.shape)
            return
        block = block_of(value.shape[1])
        padded = torch.nn.functional.pad(value, (0, -value.shape[1] % block))
        codes, absmax = quantize(padded, self.tables[name], block)
        blocks = padded.shape[1] // block
        for kind, flat, width in (("codes", codes, padded.shape[1]), ("absmax", absmax, blocks)):
            rows = flat.view(len(value), width)
            state[f"{name}_{kind}"] = sharded_like(rows, param, (param.shape[0], width))


def block_of(columns: int) -> int:
    """Number of values in a block of a matrix with so many columns."""
    return min(BLOCK, columns)
