"""A decode step as one function of tensors, compiled: `python -m infer.generate --compile`.

    tokens_B, positions_B, keys and values of every layer  →  x_BD, and the new keys and values in their slots

Python reads no value of a tensor in it: rows and slots come in powers of two, a token's slot is its position, and who
sees whom is a mask of positions. So torch.compile takes it whole, and a token is one call in place of some 600 small
ones. Compiling takes about a minute and a half on two cores (torch keeps the result for later processes), which pays
from some 26,000 tokens on. The prompts are read as always (cache.py), and their keys are copied into the slots.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infer.engine.cache import Cache
from infer.engine.forward import Engine
from kernels.launch import power_of_2

Layers = list[Tensor]  # one tensor for each layer


def decode_step(engine: Engine) -> Callable[[Tensor, Tensor, Layers, Layers], Tensor]:
    """step(tokens_B, position_B, keys, values) → x_BD, for keys and values (B, G, S, K) whose slots are positions."""

    def step(tokens_B: Tensor, position_B: Tensor, keys: Layers, values: Layers) -> Tensor:
        B, G, S, K = keys[0].shape
        row_B, slot_S = torch.arange(B, device=position_B.device), torch.arange(S, device=position_B.device)
        past_BS = slot_S <= position_B[:, None]

        def attend(layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
            k_BGSK, v_BGSK, window = keys[layer], values[layer], engine.layers[layer].window
            k_BGSK[row_B, :, position_B] = k_BGK.to(k_BGSK.dtype)
            v_BGSK[row_B, :, position_B] = v_BGK.to(v_BGSK.dtype)
            seen_BS = past_BS if window is None else past_BS & (slot_S > position_B[:, None] - window)
            q_BGMK = (q_BHK * engine.scale).view(B, G, -1, K)
            score_BGMS = torch.matmul(q_BGMK, k_BGSK.to(q_BHK.dtype).mT)
            weight_BGMS = score_BGMS.masked_fill(~seen_BS[:, None, None], float("-inf")).softmax(-1)
            return torch.matmul(weight_BGMS, v_BGSK.to(q_BHK.dtype)).view(B, -1, K)

        return engine.forward(tokens_B, position_B, attend)

    return step


class StaticCache:
    """Keys and values of requests in slots of fixed number, in the place of their Cache once the prompts are read.

    `new` tokens of each will follow at most. If the step cannot be compiled, one line on stderr says so and it runs
    uncompiled.
    """

    def __init__(self, engine: Engine, cache: Cache, new: int) -> None:
        self.engine, self.next_B = engine, cache.start_B + cache.length_B
        self.row_B = torch.arange(len(self.next_B))  # each request's row of the buffers
        self.function = decode_step(engine)
        how: dict[str, Any] = {"cpp_wrapper": engine.device.type == "cpu"}  # saves a tenth of Python's calls' time
        self.run = torch.compile(self.function, fullgraph=True, dynamic=False, options=how)
        slots = power_of_2(int(self.next_B.max()) + new)
        shape = (power_of_2(len(self.next_B)), engine.groups, slots, engine.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=engine.cache_dtype, device=engine.device) for _ in engine.layers]
            for _ in range(2)
        )
        for layer in range(len(engine.layers)):
            keys, values = (
                [level.keys[layer] for level in cache.levels],
                [level.values[layer] for level in cache.levels],
            )
            copy_branches(self.keys[layer], cache, keys, cache.keys[layer].mT)
            copy_branches(self.values[layer], cache, values, cache.values[layer])

    def step(self, tokens_B1: Tensor, count_B: Tensor) -> Tensor:
        """Enter a token of every request → x_B1D."""
        size = len(self.keys[0])
        tokens, position = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        tokens[self.row_B], position[self.row_B] = tokens_B1[:, 0].cpu(), self.next_B
        exc = torch._dynamo.exc  # loaded by torch.compile
        given = tokens.to(self.engine.device), position.to(self.engine.device), self.keys, self.values
        try:
            x_bD = self.run(*given)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:  # the latter: the ninth size
            reason = str(error).strip().splitlines()[0]
            print(f"--compile: the step cannot be compiled and runs as it is ({reason})", file=sys.stderr)
            self.run = self.function
            x_bD = self.run(*given)
        self.next_B = self.next_B + count_B
        return x_bD[self.row_B.to(x_bD.device), None]

    def retain(self, rows: list[int]) -> None:
        """Drop all other requests. Their rows are computed on: smaller buffers would be compiled anew."""
        self.row_B, self.next_B = self.row_B[rows], self.next_B[rows]


def copy_branches(slots_BGSK: Tensor, cache: Cache, levels: Sequence[Tensor], own_BGCK: Tensor) -> None:
    """A layer's keys or values, the prefixes' of each level (P, G, S, K) and the branches' own, to their slots."""
    for level, held_PGSK in zip(cache.levels, levels, strict=True):
        kept = zip(level.prefixes, level.first_P.tolist(), level.length_P.tolist(), held_PGSK, strict=True)
        for prefix, first, length, held_GSK in kept:
            below = slice(prefix.branches.start, prefix.branches.stop)
            slots_BGSK[below, :, first : first + length] = held_GSK[:, :length]
    for row, (start, length) in enumerate(zip(cache.start_B.tolist(), cache.length_B.tolist(), strict=True)):
        slots_BGSK[row, :, start : start + length] = own_BGCK[row, :, :length]
