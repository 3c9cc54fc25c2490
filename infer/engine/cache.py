"""KV cache of a prefix tree of prompts (tree.py), and the attention over it.

A branch's queries see the keys of the prefixes above it and its own. A prefix's keys are stored once and multiplied
with the queries of all branches below it in one product (levels.py). The scores of all levels and of the branches' own
slots are written into one tensor, so the softmax is an ordinary one.

B branches, P prefixes of a level, T new tokens of a branch, N tokens of a forward pass, S keys of a level or slots of a
branch, A keys in all, H heads, G key/value heads, K head size, M = H / G · T query rows per key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import kernels
from infer.engine.causal import causal
from infer.engine.forward import Engine
from infer.engine.fuse import read_attention, tree_attention
from infer.engine.levels import Level, cat_padded, levels_of, padded, similar
from infer.engine.settings import Hidden
from infer.engine.tree import Branch, Prefix

SPARE = 32  # minimum number of slots by which the branches' buffers grow
UNBLOCKED = 16  # up to this many queries, one product over all keys beats causal attention in blocks


class Cache:
    """KV cache of a prefix tree. Prefixes are prefilled on construction; `step` appends tokens to the branches.

    `hidden` gives for each prompt what to mask; `held` is a cache to copy keys and values from for prefixes that it
    already has.
    """

    def __init__(
        self,
        engine: Engine,
        prefixes: list[Prefix],
        branches: list[Branch],
        hidden: Sequence[Hidden | None] = (),
        held: Cache | None = None,
    ) -> None:
        self.engine, self.prefixes = engine, prefixes
        self.windows = set(engine.config.windows)
        starts = [branch.start for branch in branches]
        self.start_B = torch.tensor(starts)  # position of a branch's slot 0; on the host, as all lengths
        self.length_B = torch.zeros_like(self.start_B)
        self.keys: list[Tensor] = []  # k_BGKC of each layer, C slots
        self.values: list[Tensor] = []  # v_BGCK
        self.capacity = 0  # C
        self.hidden_B3: Tensor | None = None  # (first, stop, after) of each branch's Hidden; zeros for none
        if any(hidden):
            of_branches = [hidden[branch.prompt] for branch in branches]
            self.hidden_B3 = torch.tensor([[x.first, x.stop, x.after] if x else [0, 0, 0] for x in of_branches])
        if held is not None:
            for prefix in prefixes:
                keys, values = held.find(prefix.text())
                prefix.keys, prefix.values = ([x_GSK[:, prefix.start :] for x_GSK in kept] for kept in (keys, values))
        self._prefill_prefixes()
        self.levels = [padded(group) for group in levels_of(prefixes)]

    def find(self, tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (k_GSK and v_GSK of each layer) of `tokens`, if the path to some prefix begins with them.
        ([], []) if none does, or if a sliding window has dropped keys of that path."""
        places = {id(prefix): (level, m) for level in self.levels for m, prefix in enumerate(level.prefixes)}
        for prefix in self.prefixes:
            path = prefix.path()
            all_kept = all(part.first == part.start for part in path)
            if all_kept and prefix.text()[: len(tokens)] == tokens:
                kept: tuple[list[Tensor], list[Tensor]] = ([], [])
                for layer in range(len(self.engine.layers)):
                    for found, store in zip(kept, ("keys", "values"), strict=True):
                        parts = []
                        for part in path:
                            level, m = places[id(part)]
                            parts.append(getattr(level, store)[layer][m, :, : len(part.tokens)])
                        found.append(torch.cat(parts, dim=1)[:, : len(tokens)])
                return kept
        return [], []

    # ---- prefill of the prefixes ----------------------------------------------------------------------------------

    def _prefill_prefixes(self) -> None:
        """Prefills all prefixes by depth. Those of one depth share forward passes of at most engine.chunk tokens, which
        bounds the activations' memory; a prefix longer than that takes several passes."""
        depth = [prefix for prefix in self.prefixes if prefix.parent is None]
        chunk = self.engine.chunk
        while depth:
            spans: list[tuple[Prefix, int, int]] = []
            size = 0
            for prefix in (one for one in depth if not one.keys):
                for begin in range(0, len(prefix.tokens), chunk):
                    end = min(begin + chunk, len(prefix.tokens))
                    if spans and (size + end - begin > chunk or spans[-1][0] is prefix):
                        self._prefill(spans)
                        spans, size = [], 0
                    spans.append((prefix, begin, end))
                    size += end - begin
            if spans:
                self._prefill(spans)
            depth = [prefix for prefix in self.prefixes if any(prefix.parent is above for above in depth)]

    def _prefill(self, spans: list[tuple[Prefix, int, int]]) -> None:
        """One forward pass over the tokens begin … end − 1 of each (prefix, begin, end)."""
        device = self.engine.device
        tokens_N = torch.tensor([t for prefix, a, b in spans for t in prefix.tokens[a:b]], device=device)
        positions = [torch.arange(prefix.start + a, prefix.start + b, device=device) for prefix, a, b in spans]
        position_N = torch.cat(positions)

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            outs, at = [], 0
            for prefix, a, b in spans:
                rows = slice(at, at + b - a)
                at = rows.stop
                outs.append(self._prefill_attend(layer, prefix, a, q_NHK[rows], k_NGK[rows], v_NGK[rows]))
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        self.engine.forward(tokens_N, position_N, attend)
        bound = self.engine.config.window
        for prefix, _, b in spans:
            if bound is not None and prefix.start + b - prefix.first > 2 * bound:
                drop = prefix.start + b - bound - prefix.first  # keys outside every later query's window
                prefix.first += drop
                for held in (prefix.keys, prefix.values):
                    for layer, kept_GSK in enumerate(held):  # layer by layer: only one has two copies at a time
                        held[layer] = kept_GSK[:, drop:].clone()

    def _prefill_attend(
        self, layer: int, prefix: Prefix, begin: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor
    ) -> Tensor:
        k_GTK, v_GTK = (kept_TGK.transpose(0, 1).to(self.engine.cache_dtype) for kept_TGK in (k_TGK, v_TGK))
        if begin == 0:
            prefix.keys.append(k_GTK.contiguous())
            prefix.values.append(v_GTK.contiguous())
        else:
            prefix.keys[layer] = torch.cat([prefix.keys[layer], k_GTK], dim=1)
            prefix.values[layer] = torch.cat([prefix.values[layer], v_GTK], dim=1)
        path = prefix.path()
        keys = torch.cat([n.keys[layer] for n in path], dim=1) if len(path) > 1 else prefix.keys[layer]
        values = torch.cat([n.values[layer] for n in path], dim=1) if len(path) > 1 else prefix.values[layer]
        key_positions = [torch.arange(n.first, n.first + n.keys[layer].shape[1]) for n in path]
        key_position_S = torch.cat(key_positions)
        position = prefix.start + begin
        window = self.engine.layers[layer].window
        if self.engine.fused:
            return read_attention(q_THK, keys, values, position, key_position_S.to(q_THK.device), window)
        return causal(q_THK.transpose(0, 1), keys, values, position, key_position_S, window)

    # ---- the branches' steps -------------------------------------------------------------------------------------

    def step(self, tokens_BT: Tensor, count_B: Tensor) -> Tensor:
        """Forward pass over T tokens per branch, of which the first count_B are real and the rest padding → x_BTD.
        Their keys and values are stored."""
        B, T = tokens_BT.shape
        self._grow(T)
        device = tokens_BT.device
        slots_BT = self.length_B[:, None] + torch.arange(T)
        position_BT = self.start_B[:, None] + slots_BT
        S = int(self.length_B.max()) + T
        reach = {window: self._reach(window, position_BT) for window in self.windows}
        masks = {}
        fused = self.engine.fused and self.hidden_B3 is None  # the kernels mask causally, but do not support `hidden`
        # prefill of a single prompt: no padding, so causal attention needs no mask
        alone = B == 1 and T > UNBLOCKED and not fused and not self.levels and self.hidden_B3 is None
        if fused:
            positions = {
                window: [level.positions(begin).to(device, torch.int32) for level, begin in reach[window]]
                for window in self.windows
            }
            key_position_BS = (self.start_B[:, None] + torch.arange(S)).to(device)
        elif not alone:
            masks = {window: self._mask(window, position_BT, S, reach[window]) for window in self.windows}
            masks = {w: None if hidden is None else hidden.to(device) for w, hidden in masks.items()}
        rows_B1 = torch.arange(B, device=device)[:, None]
        even = bool((self.length_B == self.length_B[0]).all())
        at = int(self.length_B[0])
        slots_BT, position_BT = slots_BT.to(device), position_BT.to(device)

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            G, K = k_NGK.shape[1:]
            k_BTGK, v_BTGK = k_NGK.view(B, T, G, K), v_NGK.unflatten(0, (B, T))
            if even:
                keys[:, :, :, at : at + T].copy_(k_BTGK.permute(0, 2, 3, 1))
                values[:, :, at : at + T].copy_(v_BTGK.transpose(1, 2))
            else:
                keys[rows_B1, :, :, slots_BT] = k_BTGK.to(keys.dtype)
                values[rows_B1, :, slots_BT] = v_BTGK.to(keys.dtype)
            window = self.engine.layers[layer].window
            q_BHTK = q_NHK.unflatten(0, (B, T)).transpose(1, 2)
            if fused:
                levels = self._kernel_levels(layer, reach[window], positions[window])
                held = keys[..., :S].mT, values[:, :, :S]
                out_BHTK = tree_attention(q_BHTK, *held, position_BT, key_position_BS, window, levels)
            elif alone:
                k_GSK = keys[0, :, :, :S].mT.contiguous()  # for other strides SDPA materializes all scores
                out_THK = causal(q_BHTK[0], k_GSK, values[0, :, :S], S - T, torch.arange(S), window)
                out_BHTK = out_THK.transpose(0, 1)[None]
            else:
                out_BHTK = self._attend(layer, q_BHTK, S, masks[window], reach[window])
            return out_BHTK.transpose(1, 2).flatten(0, 1)

        x_ND = self.engine.forward(tokens_BT.flatten(), position_BT.flatten(), attend)
        self.length_B = self.length_B + count_B
        return x_ND.view(B, T, -1)

    def _attend(
        self, layer: int, q_BHTK: Tensor, S: int, unseen_BTA: Tensor | None, reach: list[tuple[Level, int]]
    ) -> Tensor:
        """Attention of the new tokens over A keys: those of the levels within the window, then the S own slots."""
        B, H, T, K = q_BHTK.shape
        k_BGKS = self.keys[layer][:, :, :, :S].to(q_BHTK.dtype)  # the cache may have a narrower dtype
        v_BGSK = self.values[layer][:, :, :S].to(q_BHTK.dtype)
        G = k_BGKS.shape[1]
        q_BGMK = (q_BHTK * self.engine.scale).reshape(B, G, H // G * T, K)
        sizes = [level.keys[layer].shape[2] - begin for level, begin in reach]
        score_BGMA = q_BGMK.new_empty(B, G, H // G * T, sum(sizes) + S)
        at = 0
        for (level, begin), size in zip(reach, sizes, strict=True):
            k_PGSK = level.keys[layer][:, :, begin:].to(q_BHTK.dtype)
            score_BGMA[level.rows, ..., at : at + size] = level.product(q_BGMK[level.rows], k_PGSK.mT)
            at += size
        score_BGMA[..., at:] = torch.matmul(q_BGMK, k_BGKS)
        if unseen_BTA is not None:
            score_BGMA.view(B, G, -1, T, at + S).masked_fill_(unseen_BTA[:, None, None], float("-inf"))
        weight_BGMA = score_BGMA.softmax(-1)  # accumulates in at least fp32, rounds once
        out_BGMK = torch.matmul(weight_BGMA[..., at:], v_BGSK)
        at = 0
        for (level, begin), size in zip(reach, sizes, strict=True):
            v_PGSK = level.values[layer][:, :, begin:].to(q_BHTK.dtype)
            out_BGMK[level.rows].add_(level.product(weight_BGMA[level.rows, ..., at : at + size], v_PGSK))
            at += size
        return out_BGMK.view(B, H, T, K)

    def _mask(self, window: int | None, position_BT: Tensor, S: int, reach: list[tuple[Level, int]]) -> Tensor | None:
        """unseen_BTA, True where a query must not see a key (in `_attend`'s order of keys); None if all are visible."""
        key_position_B1A, position_BT1 = self._key_positions(S, reach)[:, None], position_BT[..., None]
        seen_BTA = (key_position_B1A >= 0) & (key_position_B1A <= position_BT1)
        if window is not None:
            seen_BTA &= key_position_B1A > position_BT1 - window
        if self.hidden_B3 is not None:
            first_B11, stop_B11, after_B11 = self.hidden_B3[..., None, None].unbind(1)
            here_B1A = (key_position_B1A >= first_B11) & (key_position_B1A < stop_B11)
            seen_BTA &= ~(here_B1A & (position_BT1 >= after_B11))
        return None if bool(seen_BTA.all()) else ~seen_BTA

    def _key_positions(self, S: int, reach: list[tuple[Level, int]]) -> Tensor:
        """key_position_BA: positions of each branch's keys, the levels' first, then the S own slots; −1 for padding."""
        parts = []
        for level, begin in reach:
            position_rS = level.positions(begin)[level.prefix_r].masked_fill(level.prefix_r[:, None] < 0, -1)
            position_BS = position_rS.new_full((len(self.start_B), position_rS.shape[1]), -1)
            position_BS[level.rows] = position_rS
            parts.append(position_BS)
        return torch.cat([*parts, self.start_B[:, None] + torch.arange(S)], dim=-1)

    def _reach(self, window: int | None, position_BT: Tensor) -> list[tuple[Level, int]]:
        """The levels with keys inside some query's window, each with the index of its first such key."""
        if window is None:
            return [(level, 0) for level in self.levels]
        oldest = int(position_BT.min()) - window + 1
        found = []
        for level in self.levels:
            begin = max(0, oldest - int(level.first_P.max()))
            if begin < level.keys[0].shape[2] and oldest < max(prefix.end for prefix in level.prefixes):
                found.append((level, begin))
        return found

    def _kernel_levels(
        self, layer: int, reach: list[tuple[Level, int]], positions: list[Tensor]
    ) -> list[kernels.Level]:
        """The levels within the window as arguments of kernels.tree_attention."""
        return [
            kernels.Level(
                level.keys[layer][:, :, begin:],
                level.values[layer][:, :, begin:],
                position_PS,
                level.start_P,
                level.count_P,
                level.branch_Pn.shape[1],
            )
            for (level, begin), position_PS in zip(reach, positions, strict=True)
        ]

    def _key_layout(self, k_BGKC: Tensor) -> Tensor:
        """Makes slots the contiguous dimension, as the product for the scores reads keys; with kernels, K."""
        return k_BGKC.mT.contiguous().mT if self.engine.fused else k_BGKC.contiguous()

    def _slots_needed(self, T: int) -> int:
        return int(self.length_B.max()) + T if len(self.length_B) else 0

    def _drop_slots_outside_window(self) -> None:
        window = self.engine.config.window
        drop = 0 if window is None else int((self.length_B - window + 1).min())  # invisible to all later queries
        if drop > 0:
            for layer, (k_BGKC, v_BGCK) in enumerate(zip(self.keys, self.values, strict=True)):
                self.keys[layer] = self._key_layout(k_BGKC[..., drop:])
                self.values[layer] = v_BGCK[:, :, drop:].clone()
            self.start_B, self.length_B = self.start_B + drop, self.length_B - drop
            self.capacity -= drop

    def _grow(self, T: int) -> None:
        """Makes sure that every branch has T free slots."""
        if self.capacity and self._slots_needed(T) > self.capacity:
            self._drop_slots_outside_window()
        need = self._slots_needed(T)
        if need <= self.capacity:
            return
        capacity = need + max(SPARE, need // 4)
        B, G, K = len(self.length_B), self.engine.groups, self.engine.head_dim
        like: dict[str, Any] = {"dtype": self.engine.cache_dtype, "device": self.engine.device}
        for layer in range(len(self.engine.layers)):  # layer by layer: only one has two copies at a time
            k_BGKC = self._key_layout(torch.zeros(B, G, K, capacity, **like))
            v_BGCK = torch.zeros(B, G, capacity, K, **like)
            if self.capacity:
                k_BGKC[..., : self.capacity] = self.keys[layer]
                v_BGCK[:, :, : self.capacity] = self.values[layer]
            self.keys[layer : layer + 1], self.values[layer : layer + 1] = [k_BGKC], [v_BGCK]
        self.capacity = capacity

    def retain(self, rows: list[int]) -> None:
        """Drops all branches but `rows` (ascending), and frees prefixes without branches."""
        kept_B = torch.tensor(rows)
        index = kept_B.to(self.engine.device)
        self.start_B, self.length_B = self.start_B[kept_B], self.length_B[kept_B]
        self.capacity = min(self.capacity, int(self.length_B.max()) + SPARE)
        for layer, (k_BGKC, v_BGCK) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[layer] = self._key_layout(k_BGKC[index, :, :, : self.capacity])
            self.values[layer] = v_BGCK[index, :, : self.capacity]
        if self.hidden_B3 is not None:
            kept_B3 = self.hidden_B3[kept_B]
            self.hidden_B3 = kept_B3 if bool(kept_B3.any()) else None
        for prefix in self.prefixes:
            below = [new for new, old in enumerate(rows) if old in prefix.branches]
            prefix.branches = range(below[0], below[-1] + 1) if below else range(0)
        self.prefixes = [prefix for prefix in self.prefixes if prefix.branches]
        for level in self.levels:
            level.retain()
        self.levels = [level for level in self.levels if level.prefixes]

    def join(self, other: Cache) -> None:
        """Appends another cache's branches. Each of its levels is merged into one of similar lengths, if there is
        one."""
        own = len(self.start_B)
        for layer in range(len(self.engine.layers)):
            self.keys[layer] = self._key_layout(cat_padded(self.keys[layer], other.keys[layer], dim=-1))
            self.values[layer] = cat_padded(self.values[layer], other.values[layer], dim=-2)
        self.capacity = max(self.capacity, other.capacity)
        self.start_B = torch.cat([self.start_B, other.start_B])
        self.length_B = torch.cat([self.length_B, other.length_B])
        if self.hidden_B3 is not None or other.hidden_B3 is not None:
            sizes = ((self.hidden_B3, own), (other.hidden_B3, len(other.start_B)))
            parts = [torch.zeros(size, 3, dtype=torch.int64) if held is None else held for held, size in sizes]
            self.hidden_B3 = torch.cat(parts)
        for prefix in other.prefixes:
            prefix.branches = range(own + prefix.branches.start, own + prefix.branches.stop)
        self.prefixes += other.prefixes
        free = [*self.levels]  # each merges with at most one: in a level, a branch is below at most one prefix
        for level in other.levels:
            level.index()
            length_P = level.length_P.tolist()
            match = next((held for held in free if similar([*held.length_P.tolist(), *length_P])), None)
            if match is None:
                self.levels.append(level)
            else:
                free.remove(match)
                match.join(level)
