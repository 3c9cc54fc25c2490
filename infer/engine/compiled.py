"""A decode step over a static KV cache, compiled and captured: `python -m infer.generate --compile on`.

    tokens_B, position_B, keys and values of every layer  →  x_BD; the new keys and values are written to their slots

Numbers of rows and slots are powers of two, a token's slot is its position, and attention is masked by position, so the
step never reads a tensor's value on the host. torch.compile takes it as one graph: one call per step instead of about
600 dispatches; a model of fused blocks (fuse.py) runs its kernels instead. On a GPU either is captured as a CUDA graph.
Compiling takes about a minute and a half on two cores (torch caches the result across processes) and pays from about
26,000 tokens on. Prefill is not compiled: cache.py computes it, and its keys and values are copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernels
from infer.engine.cache import Cache
from infer.engine.forward import Engine
from kernels.launch import captured, power_of_2

Layers = list[Tensor]  # one tensor per layer
Step = Callable[[Tensor, Tensor, Layers, Layers], Tensor]


def decode_step(engine: Engine, count: int) -> Step:
    """Returns step(tokens_B, position_B, keys, values) → x_BD. Keys and values are (B, G, S, K) per layer, in slot
    order, and are updated in place. `count` is S."""
    # a table, because rotary frequencies are computed on the host; no position reaches beyond batch_length
    position_S = torch.arange(count, device=engine.device).clamp_max(engine.config.batch_length - 1)
    cos_S1K, sin_S1K = engine.rotary(position_S)

    def step(tokens_B: Tensor, position_B: Tensor, keys: Layers, values: Layers) -> Tensor:
        B, G, S, K = keys[0].shape
        row_B = torch.arange(B, device=position_B.device)
        slot_S = torch.arange(S, device=position_B.device, dtype=torch.int32)  # as the kernels take positions
        past_BS, position_B1 = slot_S <= position_B[:, None], position_B[:, None].int()

        def attend(layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
            k_BGSK, v_BGSK, window = keys[layer], values[layer], engine.layers[layer].window
            k_BGSK[row_B, :, position_B] = k_BGK.to(k_BGSK.dtype)
            v_BGSK[row_B, :, position_B] = v_BGK.to(v_BGSK.dtype)
            k_BGSK, v_BGSK = k_BGSK.to(q_BHK.dtype), v_BGSK.to(q_BHK.dtype)
            if engine.fused:
                slot_BS, q_BH1K = slot_S.expand(B, S), q_BHK[:, :, None]
                return kernels.tree_attention(q_BH1K, k_BGSK, v_BGSK, position_B1, slot_BS, window).squeeze(2)
            seen_BS = past_BS if window is None else past_BS & (slot_S > position_B[:, None] - window)
            q_BGMK = (q_BHK * engine.scale).view(B, G, -1, K)
            score_BGMS = torch.matmul(q_BGMK, k_BGSK.mT)
            weight_BGMS = score_BGMS.masked_fill(~seen_BS[:, None, None], float("-inf")).softmax(-1)
            return torch.matmul(weight_BGMS, v_BGSK).view(B, -1, K)

        return engine.forward(tokens_B, position_B, attend, (cos_S1K[position_B], sin_S1K[position_B]))

    return step


def slots(engine: Engine, rows: int, count: int) -> tuple[Layers, Layers]:
    """Keys and values of every layer, zeros, with `count` slots for each of `rows` rows."""
    shape = rows, engine.groups, count, engine.head_dim
    keys, values = (
        [torch.zeros(shape, dtype=engine.cache_dtype, device=engine.device) for _ in engine.layers] for _ in range(2)
    )
    return keys, values


class Captured:
    """A step as a CUDA graph: inputs are copied to the graph's own tensors, and one launch replays all kernels.

    Capturing runs the step a few times with the first inputs, which writes the same keys and values each time.
    """

    def __init__(self, step: Step, tokens_B: Tensor, position_B: Tensor, keys: Layers, values: Layers) -> None:
        self.tokens_B, self.position_B = tokens_B.clone(), position_B.clone()

        def run() -> None:
            self.x_BD = step(self.tokens_B, self.position_B, keys, values)

        self.graph = captured([run])

    def __call__(self, tokens_B: Tensor, position_B: Tensor, keys: Layers, values: Layers) -> Tensor:
        self.tokens_B.copy_(tokens_B)
        self.position_B.copy_(position_B)
        self.graph.replay()
        return self.x_BD


class StaticCache:
    """A KV cache of fixed size, filled from the Cache of a prefill, for at most `new` further tokens per request.

    If the step cannot be compiled, it runs uncompiled, with one line on stderr.
    """

    def __init__(self, engine: Engine, cache: Cache, new: int) -> None:
        self.engine, self.next_B = engine, cache.start_B + cache.length_B
        self.row_B = torch.arange(len(self.next_B))  # row of each request in the buffers
        self.run: Step | None = None
        count = power_of_2(int(self.next_B.max()) + new)
        self.keys, self.values = slots(engine, power_of_2(len(self.next_B)), count)
        for layer in range(len(engine.layers)):
            level_keys = [level.keys[layer] for level in cache.levels]
            level_values = [level.values[layer] for level in cache.levels]
            copy_to_slots(self.keys[layer], cache, level_keys, cache.keys[layer].mT)
            copy_to_slots(self.values[layer], cache, level_values, cache.values[layer])

    def step(self, tokens_B1: Tensor, count_B: Tensor) -> Tensor:
        """Decodes one token of every request → x_B1D."""
        size = len(self.keys[0])
        tokens, position = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        tokens[self.row_B], position[self.row_B] = tokens_B1[:, 0].cpu(), self.next_B
        inputs = tokens.to(self.engine.device), position.to(self.engine.device), self.keys, self.values
        self.run = self.run or self.prepare(*inputs)
        x_bD = self.run(*inputs)
        self.next_B = self.next_B + count_B
        return x_bD[self.row_B.to(x_bD.device), None]

    def prepare(self, *inputs: Any) -> Step:
        """The step, compiled if possible, as a CUDA graph on a GPU. Runs it on `inputs`."""
        step, cpu = decode_step(self.engine, self.keys[0].shape[2]), self.engine.device.type == "cpu"
        if not self.engine.fused:
            options: dict[str, Any] = {"cpp_wrapper": cpu}  # a tenth less time than Python wrappers
            compiled = torch.compile(step, fullgraph=True, dynamic=False, options=options)
            exc = torch._dynamo.exc  # loaded by torch.compile
            try:
                compiled(*inputs)
                step = compiled
            except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:  # the latter: at the ninth shape
                reason = str(error).strip().splitlines()[0]
                print(f"--compile: the step cannot be compiled and runs uncompiled ({reason})", file=sys.stderr)
        return step if cpu else Captured(step, *inputs)

    def retain(self, rows: list[int]) -> None:
        """Drops all other requests. Their rows stay in the buffers: another shape would be compiled again."""
        self.row_B, self.next_B = self.row_B[rows], self.next_B[rows]


def copy_to_slots(slots_BGSK: Tensor, cache: Cache, levels: Sequence[Tensor], own_BGCK: Tensor) -> None:
    """Copies one layer's keys or values, those of the prefixes (a (P, G, S, K) per level) and of the branches, to their
    slots."""
    for level, held_PGSK in zip(cache.levels, levels, strict=True):
        kept = zip(level.prefixes, level.first_P.tolist(), level.length_P.tolist(), held_PGSK, strict=True)
        for prefix, first, length, held_GSK in kept:
            below = slice(prefix.branches.start, prefix.branches.stop)
            slots_BGSK[below, :, first : first + length] = held_GSK[:, :length]
    for row, (start, length) in enumerate(zip(cache.start_B.tolist(), cache.length_B.tolist(), strict=True)):
        slots_BGSK[row, :, start : start + length] = own_BGCK[row, :, :length]
