"""AdamW whose two averages are kept in blocks of 8 bits (arXiv 2110.02861), in plain PyTorch.

Each step widens a parameter's state, takes AdamW's step, and narrows it again; tensors of fewer than 4,096 values keep
fp32 state, as bitsandbytes has it. Paging the state to the host's memory is not done here. One process only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.blockwise import dequantise, dynamic_table, quantise

BLOCK = 256
SMALL = 4096


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW with 8-bit state (decoupled weight decay, eps 1e-8 outside the root)."""

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
        state = self.state[param]
        mean, square = self.read(state, "mean", param), self.read(state, "square", param)
        state["step"] = state.get("step", torch.zeros(())) + 1
        beta1, beta2 = group["betas"]
        grad, t = param.grad.to(mean.dtype), float(state["step"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(mean.to(param.dtype), root.to(param.dtype), value=-group["lr"] / (1 - beta1**t))
        self.write(state, "mean", mean)
        self.write(state, "square", square)

    def read(self, state: dict[str, Any], name: str, param: Tensor) -> Tensor:
        if name in state:
            return state[name]
        if f"{name}_codes" in state:
            flat = dequantise(state[f"{name}_codes"], state[f"{name}_absmax"], self.tables[name], BLOCK)
            return flat.view(param.shape)
        return torch.zeros_like(param, dtype=torch.float32)

    def write(self, state: dict[str, Any], name: str, value: Tensor) -> None:
        if value.numel() < SMALL:
            state[name] = value
        else:
            state[f"{name}_codes"], state[f"{name}_absmax"] = quantise(value, self.tables[name], BLOCK)
