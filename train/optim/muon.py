"""torch.optim.Muon (arXiv 2502.16982) for matrices that are sharded over ranks.

Muon orthogonalises the update of a whole matrix, and no rank holds one. So each matrix is gathered in turn with its
gradient and momentum; every rank takes torch's step on it and keeps its own rows. The result is bit-identical to one
process. The extra memory is one matrix; every rank repeats the orthogonalisation, which saves a second communication.
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

    def update(self, param: Any, options: dict) -> None:  # Any: a DTensor, whose .grad torch types as a plain tensor
        whole = nn.Parameter(param.full_tensor().clone())
        whole.grad = param.grad.full_tensor()
        muon = torch.optim.Muon([whole], **options)
        if self.state[param]:
            muon.state[whole] = {key: value.full_tensor().clone() for key, value in self.state[param].items()}
        with torch.enable_grad():
            muon.step()
        rows = rows_of(param, len(whole))
        local(param).copy_(whole[rows])
        for key, value in muon.state[whole].items():
            self.state[param][key] = sharded_like(value[rows].clone(), param, param.shape)
