"""torch's Muon (arXiv 2502.16982) where matrices are sharded over ranks.

Its update orthogonalises the whole matrix, which no rank holds. So one matrix at a time is gathered with its gradient
and momentum, every rank takes torch's own step on the whole, and keeps its rows: the same arithmetic as on one process,
bit for bit. Memory grows by one matrix at a time; the orthogonalisation is done on every rank, which costs its time
again but needs no second exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.distributed.sharding import local, rows_of, sharded_like


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon over sharded parameters."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key in self.defaults}
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, options)

    def update(self, param: Any, options: dict) -> None:  # a DTensor, whose gradient torch types as a plain tensor
        whole = nn.Parameter(param.full_tensor().clone())
        whole.grad = param.grad.full_tensor()
        alone = torch.optim.Muon([whole], **options)
        if self.state[param]:
            alone.state[whole] = {key: value.full_tensor().clone() for key, value in self.state[param].items()}
        with torch.enable_grad():
            alone.step()
        mine = rows_of(param, len(whole))
        local(param).copy_(whole[mine])
        for key, value in alone.state[whole].items():
            self.state[param][key] = sharded_like(value[mine].clone(), param, param.shape)
