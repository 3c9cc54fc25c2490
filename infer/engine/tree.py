"""Prompts as a tree: what several prompts begin with is computed and kept once.

Nine questions about a note share the note (and "### Question: "), all notes of a batch may share an instruction, which
is then computed once a batch:

    instruction ─┬─ note 1 ─┬─ question 1 → answer          a *prefix* is shared by branches, or long
                 │          └─ question 2 → answer          a *branch* is a prompt's own end and what it generates
                 └─ note 2 ─── …

Each branch's queries see the keys of the prefixes above it and its own. A prefix's keys are stored once and meet the
queries of all branches below it in one product. A level's prefixes are padded to one length, so that a level is one
product for the scores and one for the values, however many notes there are. The scores of all levels and of the
branches' own slots are adjacent in one tensor, so one softmax over it is the definition's.

B branches, P prefixes of a level, T new tokens of a branch, N tokens of a forward pass, S keys, H heads, G key/value
heads, K head size, M = H / G · T query rows of a key/value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from infer.engine.forward import Engine
from infer.engine.fuse import read_attention, tree_attention
from infer.engine.settings import Hidden

SHARED = 8  # tokens: a shorter common prefix is cheaper to compute again than to attend to separately
OWN = 64  # tokens: a longer private part becomes a prefix, so that branches of a batch stay of similar length
BLOCK = 512  # queries of one attention call while prompts are read
FEW = 128  # the same where scores are products of their own
SPARE = 32  # slots by which branches grow


@dataclass
class Prefix:
    """Consecutive tokens below `parent`; `branches` are those below it, a range in the order of the tree."""

    parent: Prefix | None
    tokens: list[int]
    start: int  # the position of its first token
    branches: range = range(0)
    first: int = 0  # the first position that is kept (a window drops older ones)
    keys: list[Tensor] = field(default_factory=list)  # k_GSK of each layer
    values: list[Tensor] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[Prefix]:
        """The prefix and its ancestors, from the root."""
        return [*(self.parent.path() if self.parent else []), self]

    def text(self) -> list[int]:
        """All tokens from the root to the prefix's end."""
        return [token for prefix in self.path() for token in prefix.tokens]


@dataclass
class Branch:
    """A prompt's own end: `tokens` (at least one) from position `start`; `prompt` is its index in the request."""

    parent: Prefix | None
    tokens: list[int]
    start: int
    prompt: int


@dataclass(eq=False)
class Level:
    """Adjacent prefixes of one depth: their keys and values padded to one length, side by side.

    `branch_Pn` are the branches below each prefix (P prefixes, at most n branches each; places beyond a prefix's own
    repeat a branch). `place_r` is the place of each of the branches `rows` in it, flattened. Of branches below none of
    the prefixes `below_r` is False, and the mask hides the level from them.
    """

    prefixes: list[Prefix]
    keys: list[Tensor]  # k_PGSK of each layer
    values: list[Tensor]  # v_PGSK
    first_P: Tensor  # the position of each prefix's first held token; on the host, as all that is known
    length_P: Tensor  # in advance: reading a number from a device waits for it. Kept tokens of each prefix
    rows: slice = field(default_factory=lambda: slice(0))
    branch_Pn: Tensor = field(init=False)
    place_r: Tensor = field(init=False)
    below_r: Tensor = field(init=False)
    outside_r: Tensor = field(init=False)  # its opposite, on the device
    prefix_r: Tensor = field(init=False)  # the prefix above each of the branches
    start_P: Tensor = field(init=False)  # the first branch below each prefix and their number, int32 on the device,
    count_P: Tensor = field(init=False)  # for the kernels
    whole: bool = False  # every branch of `rows` is below a prefix
    even: bool = False  # every branch once, in order: nothing needs to be gathered

    def index(self) -> None:
        """Find `rows` and the index tensors from the prefixes' ranges of branches."""
        ranges = [prefix.branches for prefix in self.prefixes]
        start, stop = ranges[0].start, ranges[-1].stop
        n = max(map(len, ranges))
        self.rows = slice(start, stop)
        places = {branch: m * n + i for m, below in enumerate(ranges) for i, branch in enumerate(below)}
        device = self.keys[0].device
        branches = [[below[min(i, len(below) - 1)] - start for i in range(n)] for below in ranges]
        self.branch_Pn = torch.tensor(branches, device=device)
        self.prefix_r = torch.tensor([places.get(branch, 0) // n for branch in range(start, stop)])
        self.place_r = torch.tensor([places.get(branch, 0) for branch in range(start, stop)], device=device)
        self.below_r = torch.tensor([branch in places for branch in range(start, stop)])
        self.outside_r = ~self.below_r.to(device)
        self.start_P, self.count_P = torch.tensor(
            [[below.start for below in ranges], [len(below) for below in ranges]], dtype=torch.int32, device=device
        )
        self.whole = len(places) == stop - start
        self.even = self.whole and len(places) == self.branch_Pn.numel()

    def positions(self, begin: int) -> Tensor:
        """position_PS of the keys from `begin` on; −1 where a prefix has no key."""
        index_S = torch.arange(begin, self.keys[0].shape[2])
        return torch.where(index_S < self.length_P[:, None], self.first_P[:, None] + index_S, -1)

    def retain(self) -> None:
        """Free the prefixes that have no branch left, and index the others again."""
        kept = [m for m, prefix in enumerate(self.prefixes) if len(prefix.branches)]
        if len(kept) < len(self.prefixes):
            self.prefixes = [self.prefixes[m] for m in kept]
            longest = int(self.length_P[kept].max()) if kept else 0
            for store in (self.keys, self.values):
                for layer, held_PGSK in enumerate(store):
                    store[layer] = held_PGSK[kept, :, :longest]
            self.first_P, self.length_P = self.first_P[kept], self.length_P[kept]
        if kept:
            self.index()

    def join(self, other: Level) -> None:
        """Take over another level's prefixes, whose branches come after this one's, one layer at a time."""
        for store, added in ((self.keys, other.keys), (self.values, other.values)):
            for layer, held_PGSK in enumerate(store):
                store[layer] = beside(held_PGSK, added[layer], dim=-2)
        self.prefixes = [*self.prefixes, *other.prefixes]
        self.first_P = torch.cat([self.first_P, other.first_P])
        self.length_P = torch.cat([self.length_P, other.length_P])
        self.index()

    def product(self, x_rGMA: Tensor, y_PGAC: Tensor) -> Tensor:
        """Each branch's rows times its prefix's matrix: (r, G, M, A) × (P, G, A, C) → (r, G, M, C)."""
        prefixes, n = self.branch_Pn.shape
        r, G, M, A = x_rGMA.shape
        x_PnGMA = (x_rGMA if self.even else x_rGMA[self.branch_Pn.flatten()]).view(prefixes, n, G, M, A)
        out_PGnMC = torch.matmul(x_PnGMA.transpose(1, 2).reshape(prefixes, G, n * M, A), y_PGAC)
        out_PnGMC = out_PGnMC.view(prefixes, G, n, M, -1).transpose(1, 2)
        if self.even:
            return out_PnGMC.flatten(0, 1)
        out_rGMC = out_PnGMC.flatten(0, 1)[self.place_r]
        return out_rGMC if self.whole else out_rGMC.masked_fill_(self.outside_r[:, None, None, None], 0)


def alike(lengths: Sequence[int]) -> bool:
    """Whether padding to the longest at most doubles their sum."""
    return max(lengths) * len(lengths) <= 2 * sum(lengths)


def levels_of(prefixes: list[Prefix]) -> Iterator[list[Prefix]]:
    """Prefixes that become a Level: of one depth, adjacent, of alike lengths."""
    depth = [prefix for prefix in prefixes if prefix.parent is None]
    while depth:
        group: list[Prefix] = []
        for prefix in (prefix for prefix in depth if len(prefix.branches)):
            lengths = [len(each.keys[0][0]) for each in (*group, prefix)]
            if not alike(lengths):
                yield group
                group = []
            group.append(prefix)
        if group:
            yield group
        above = {id(prefix) for prefix in depth}
        depth = [prefix for prefix in prefixes if id(prefix.parent) in above]


def plan(prompts: Sequence[Sequence[int]], hidden: Sequence[Hidden | None] = ()) -> tuple[list[Prefix], list[Branch]]:
    """The tree of some prompts: prefixes with parents before children, branches in the tree's order. Of a prompt with
    something `hidden`, what does not see it is its branch's own."""
    prefixes: list[Prefix] = []
    branches: list[Branch] = []
    if prompts:
        ends = [len(prompt) - 1 for prompt in prompts]  # every branch keeps a token of its own
        ends = [end if one is None else one.after for end, one in zip(ends, hidden or [None] * len(ends), strict=True)]
        grow(prompts, ends, prefixes, branches, list(range(len(prompts))), 0, None)
    return prefixes, branches


def grow(
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    prefixes: list[Prefix],
    branches: list[Branch],
    indices: list[int],
    depth: int,
    parent: Prefix | None,
) -> None:
    """Enter the prompts of these indices, which are alike before `depth`, below `parent`; at most the tokens before
    their `ends` become prefixes."""
    # module-level on purpose: a recursive closure is a reference cycle, which keeps keys and values alive until gc runs

    def add(parent: Prefix | None, tokens: Sequence[int], start: int) -> Prefix:
        prefixes.append(Prefix(parent, list(tokens), start))
        return prefixes[-1]

    ids = prompts[indices[0]]
    if len(indices) == 1:
        end = ends[indices[0]]
        if end - depth >= OWN and len(prompts) > 1:
            parent = add(parent, ids[depth:end], depth)
            depth = end
            parent.branches = range(len(branches), len(branches) + 1)
        branches.append(Branch(parent, list(ids[depth:]), depth, indices[0]))
        return
    common = min(ends[i] for i in indices)
    for i in indices[1:]:
        common = next((n for n in range(depth, common) if prompts[i][n] != ids[n]), common)
    began = len(branches)
    prefix = parent
    if common - depth >= SHARED:
        prefix = add(parent, ids[depth:common], depth)
        depth = common
    groups: dict[int, list[int]] = {}
    for i in indices:
        # a group below starts where its prompts share more than the prefix; single ones are branches
        groups.setdefault(hash(tuple(prompts[i][depth : depth + SHARED])), []).append(i)
    for group in groups.values():
        whole = len(group) > 1 and min(ends[i] for i in group) >= depth + SHARED
        for part in [group] if whole else [[i] for i in group]:
            grow(prompts, ends, prefixes, branches, part, depth, prefix)
    if prefix is not parent and prefix is not None:
        prefix.branches = range(began, len(branches))


class Cache:
    """Keys and values of a tree, and the attention over them. `hidden`: what each prompt's end does not see; `held`: a
    cache that may hold some of the prefixes, which are then not computed again."""

    def __init__(
        self,
        engine: Engine,
        prefixes: list[Prefix],
        branches: list[Branch],
        hidden: Sequence[Hidden | None] = (),
        held: Cache | None = None,
    ) -> None:
        self.engine, self.prefixes = engine, prefixes
        self.windows = sorted(set(engine.config.windows), key=lambda w: (w is None, w))
        starts = [branch.start for branch in branches]
        self.start_B = torch.tensor(starts)  # position of a branch's slot 0, in the host's memory as all lengths
        self.length_B = torch.zeros_like(self.start_B)
        self.keys: list[Tensor] = []  # k_BGKC of each layer: the branches' own slots
        self.values: list[Tensor] = []  # v_BGCK
        self.capacity = 0
        self.hidden_B3: Tensor | None = None  # first, stop and after of each branch; zeros where it sees all
        if any(hidden):
            of_branches = [hidden[branch.prompt] for branch in branches]
            self.hidden_B3 = torch.tensor([[x.first, x.stop, x.after] if x else [0, 0, 0] for x in of_branches])
        if held is not None:
            for prefix in prefixes:
                keys, values = held.of(prefix.text())
                prefix.keys, prefix.values = ([x_GSK[:, prefix.start :] for x_GSK in kept] for kept in (keys, values))
                prefix.first = prefix.start
        self._read_prefixes()
        self.levels = [self._pad(group) for group in levels_of(prefixes)]

    def of(self, tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (k_GSK and v_GSK of each layer) of a text that some prefix, with those above it, begins with;
        of no layer where none does, or where a window has dropped some."""
        places = {id(prefix): (level, m) for level in self.levels for m, prefix in enumerate(level.prefixes)}
        for prefix in self.prefixes:
            path = prefix.path()
            whole = all(part.first == part.start for part in path)
            if whole and prefix.text()[: len(tokens)] == tokens:
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

    # ---- reading the prefixes -------------------------------------------------------------------------------------

    def _read_prefixes(self) -> None:
        """Compute every prefix's keys and values: level by level, ragged, in passes of bounded size."""
        level = [prefix for prefix in self.prefixes if prefix.parent is None]
        chunk = self.engine.chunk  # tokens of one pass: bounds the activations
        while level:
            spans: list[tuple[Prefix, int, int]] = []
            size = 0
            for prefix in (one for one in level if not one.keys):
                for begin in range(0, len(prefix.tokens), chunk):
                    end = min(begin + chunk, len(prefix.tokens))
                    if spans and (size + end - begin > chunk or spans[-1][0] is prefix):
                        self._read(spans)
                        spans, size = [], 0
                    spans.append((prefix, begin, end))
                    size += end - begin
            if spans:
                self._read(spans)
            level = [prefix for prefix in self.prefixes if any(prefix.parent is above for above in level)]

    def _read(self, spans: list[tuple[Prefix, int, int]]) -> None:
        device = self.engine.device
        tokens_N = torch.tensor([t for prefix, a, b in spans for t in prefix.tokens[a:b]], device=device)
        positions = [torch.arange(prefix.start + a, prefix.start + b, device=device) for prefix, a, b in spans]
        position_N = torch.cat(positions)

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            outs, at = [], 0
            for prefix, a, b in spans:
                rows = slice(at, at + b - a)
                at = rows.stop
                outs.append(self._read_attend(layer, prefix, a, q_NHK[rows], k_NGK[rows], v_NGK[rows]))
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        self.engine.forward(tokens_N, position_N, attend)
        bound = self.engine.config.window
        for prefix, _, b in spans:
            if bound is not None and prefix.start + b - prefix.first > 2 * bound:
                drop = prefix.start + b - bound - prefix.first  # later queries see at most the window's last positions
                prefix.first += drop
                for held in (prefix.keys, prefix.values):
                    for layer, kept_GSK in enumerate(held):  # one at a time: no more than one layer has two copies
                        held[layer] = kept_GSK[:, drop:].clone()

    def _read_attend(
        self, layer: int, prefix: Prefix, begin: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor
    ) -> Tensor:
        k_GTK, v_GTK = (kept_TGK.transpose(0, 1).to(self.engine.cache_dtype) for kept_TGK in (k_TGK, v_TGK))
        if begin == 0:
            if layer == 0:
                prefix.first = prefix.start
            prefix.keys.append(k_GTK.contiguous())
            prefix.values.append(v_GTK.contiguous())
        else:
            prefix.keys[layer] = torch.cat([prefix.keys[layer], k_GTK], dim=1)
            prefix.values[layer] = torch.cat([prefix.values[layer], v_GTK], dim=1)
        path = prefix.path()
        keys = torch.cat([n.keys[layer] for n in path], dim=1) if len(path) > 1 else prefix.keys[layer]
        values = torch.cat([n.values[layer] for n in path], dim=1) if len(path) > 1 else prefix.values[layer]
        key_positions = [torch.arange(n.first, n.first + n.keys[layer].shape[1], device=q_THK.device) for n in path]
        key_position_S = torch.cat(key_positions)
        position = prefix.start + begin
        window = self.engine.layers[layer].window
        if self.engine.fused:
            return read_attention(q_THK, keys, values, position, key_position_S, window)
        return causal(q_THK.transpose(0, 1), keys, values, position, key_position_S, window)

    # ---- the branches' steps -------------------------------------------------------------------------------------

    def step(self, tokens_BT: Tensor, count_B: Tensor) -> Tensor:
        """Enter up to T tokens of every branch (count_B of them are real; the rest is padding) → x_BTD."""
        B, T = tokens_BT.shape
        self._grow(T)
        device = tokens_BT.device
        slots_BT = self.length_B[:, None] + torch.arange(T)
        position_BT = self.start_B[:, None] + slots_BT
        S = int(self.length_B.max()) + T
        key_position_BS = self.start_B[:, None] + torch.arange(S)
        reach = {window: self._reach(window, position_BT) for window in self.windows}
        masks = {}
        fused = self.engine.fused and self.hidden_B3 is None  # the kernels mask by themselves, and hide nothing
        if fused:
            positions = {window: self._key_positions(reach[window]) for window in self.windows}
        else:
            masks = {window: self._mask(window, position_BT, slots_BT, S, reach[window]) for window in self.windows}
            masks = {w: None if hidden is None else hidden.to(device) for w, hidden in masks.items()}
        rows_B1 = torch.arange(B, device=device)[:, None]
        even = bool((self.length_B == self.length_B[0]).all())
        at = int(self.length_B[0])
        slots_BT, position_BT, key_position_BS = (x.to(device) for x in (slots_BT, position_BT, key_position_BS))

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
            else:
                out_BHTK = self._attend(layer, q_BHTK, S, masks[window], reach[window])
            return out_BHTK.transpose(1, 2).flatten(0, 1)

        x_ND = self.engine.forward(tokens_BT.flatten(), position_BT.flatten(), attend)
        self.length_B = self.length_B + count_B
        return x_ND.view(B, T, -1)

    def _attend(
        self, layer: int, q_BHTK: Tensor, S: int, hidden_BTA: Tensor | None, reach: list[tuple[Level, int]]
    ) -> Tensor:
        """Attention of the branches' new tokens over all A keys within reach: every level's, then the S own slots."""
        B, H, T, K = q_BHTK.shape
        k_BGKS = self.keys[layer][:, :, :, :S].to(q_BHTK.dtype)  # the cache may be narrower
        v_BGSK = self.values[layer][:, :, :S].to(q_BHTK.dtype)
        if not reach and B == 1 and T > 16 and self.hidden_B3 is None:  # one prompt being read: it has no padding
            slot_S = torch.arange(S, device=q_BHTK.device)
            window = self.engine.layers[layer].window
            k_GSK = k_BGKS[0].mT.contiguous()  # else SDPA multiplies out all scores
            return causal(q_BHTK[0], k_GSK, v_BGSK[0], S - T, slot_S, window).transpose(0, 1)[None]
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
        if hidden_BTA is not None:
            score_BGMA.view(B, G, -1, T, at + S).masked_fill_(hidden_BTA[:, None, None], float("-inf"))
        weight_BGMA = score_BGMA.softmax(-1)  # computed in at least fp32, rounded once
        out_BGMK = torch.matmul(weight_BGMA[..., at:], v_BGSK)
        at = 0
        for (level, begin), size in zip(reach, sizes, strict=True):
            v_PGSK = level.values[layer][:, :, begin:].to(q_BHTK.dtype)
            out_BGMK[level.rows].add_(level.product(weight_BGMA[level.rows, ..., at : at + size], v_PGSK))
            at += size
        return out_BGMK.view(B, H, T, K)

    def _mask(
        self, window: int | None, position_BT: Tensor, slots_BT: Tensor, S: int, reach: list[tuple[Level, int]]
    ) -> Tensor | None:
        """hidden_BTA, true where a query does not see a key (as `_attend` lays keys out); None where all see all."""
        B, T = slots_BT.shape
        parts = []
        for level, begin in reach:
            key_position_rS = level.positions(begin)[level.prefix_r]
            seen_rTS = ((key_position_rS >= 0) & level.below_r[:, None])[:, None].expand(-1, T, -1)
            if window is not None:
                seen_rTS = seen_rTS & (key_position_rS[:, None] > position_BT[level.rows][..., None] - window)
            seen_BTS = seen_rTS.new_zeros(B, T, key_position_rS.shape[1])
            seen_BTS[level.rows] = seen_rTS
            parts.append(seen_BTS)
        slot_S = torch.arange(S)
        seen_BTS = slot_S <= slots_BT[..., None]
        parts.append(seen_BTS if window is None else seen_BTS & (slot_S > slots_BT[..., None] - window))
        hidden_BTA = ~torch.cat(parts, dim=-1)
        if self.hidden_B3 is not None:
            hidden_BTA |= self._unseen(self.hidden_B3, position_BT, S, reach)
        return hidden_BTA if bool(hidden_BTA.any()) else None

    def _unseen(self, hidden_B3: Tensor, position_BT: Tensor, S: int, reach: list[tuple[Level, int]]) -> Tensor:
        """unseen_BTA, true for the keys that a branch's end does not see, laid out as in `_mask`."""
        B, keys = len(hidden_B3), []
        for level, begin in reach:
            key_position_rS = level.positions(begin)[level.prefix_r]
            key_position_BS = key_position_rS.new_full((B, key_position_rS.shape[1]), -1)
            key_position_BS[level.rows] = key_position_rS
            keys.append(key_position_BS)
        keys.append(self.start_B[:, None] + torch.arange(S))
        key_position_B1A = torch.cat(keys, dim=-1)[:, None]
        first_B11, stop_B11, after_B11 = hidden_B3[..., None, None].unbind(1)
        here_B1A = (key_position_B1A >= first_B11) & (key_position_B1A < stop_B11)
        return here_B1A & (position_BT[..., None] >= after_B11)

    def _reach(self, window: int | None, position_BT: Tensor) -> list[tuple[Level, int]]:
        """(level, the first key) of the levels that some branch below them can still see through the window."""
        if window is None:
            return [(level, 0) for level in self.levels]
        oldest = int(position_BT.min()) - window + 1
        found = []
        for level in self.levels:
            begin = max(0, oldest - int(level.first_P.max()))
            if begin < level.keys[0].shape[2] and oldest < max(prefix.end for prefix in level.prefixes):
                found.append((level, begin))
        return found

    def _key_positions(self, reach: list[tuple[Level, int]]) -> list[Tensor]:
        """Each level's `positions` within reach, int32 on the device, for the kernels' masks."""
        return [level.positions(begin).to(self.engine.device, torch.int32) for level, begin in reach]

    def _kernel_levels(
        self, layer: int, reach: list[tuple[Level, int]], positions: list[Tensor]
    ) -> list[kernels.Level]:
        """The levels within reach as kernels.tree_attention takes them."""
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

    def _pad(self, prefixes: list[Prefix]) -> Level:
        """The prefixes' keys and values in one tensor a layer, one layer at a time; the prefixes' own are freed."""
        lengths = [prefix.keys[0].shape[1] for prefix in prefixes]
        level = Level(prefixes, [], [], torch.tensor([prefix.first for prefix in prefixes]), torch.tensor(lengths))
        for layer in range(len(self.engine.layers)):
            for store, name in ((level.keys, "keys"), (level.values, "values")):
                held = [getattr(prefix, name)[layer] for prefix in prefixes]
                padded_PGSK = held[0].new_zeros(len(prefixes), held[0].shape[0], max(lengths), held[0].shape[2])
                for m, (prefix, kept_GSK) in enumerate(zip(prefixes, held, strict=True)):
                    padded_PGSK[m, :, : lengths[m]] = kept_GSK
                    getattr(prefix, name)[layer] = kept_GSK.new_empty(0)  # not a view, which would keep the storage
                store.append(padded_PGSK)
        level.index()
        return level

    def _key_layout(self, k_BGKC: Tensor) -> Tensor:
        """Slots contiguous, as the scores' product reads keys; with kernels, a key's components contiguous."""
        return k_BGKC.mT.contiguous().mT if self.engine.fused else k_BGKC.contiguous()

    def _grow(self, T: int) -> None:
        need = int(self.length_B.max()) + T if len(self.length_B) else 0
        window = self.engine.config.window
        if window is not None and need > self.capacity and self.capacity:
            drop = int((self.length_B - window + 1).min())  # slots that no later query of any branch sees
            if drop > 0:
                for layer, (k_BGKC, v_BGCK) in enumerate(zip(self.keys, self.values, strict=True)):
                    self.keys[layer] = self._key_layout(k_BGKC[..., drop:])
                    self.values[layer] = v_BGCK[:, :, drop:].clone()
                self.start_B, self.length_B = self.start_B + drop, self.length_B - drop
                self.capacity, need = self.capacity - drop, need - drop
        if need <= self.capacity:
            return
        capacity = need + max(SPARE, need // 4)
        B, G, K = len(self.length_B), self.engine.groups, self.engine.head_dim
        like: dict[str, Any] = {"dtype": self.engine.cache_dtype, "device": self.engine.device}
        for layer in range(len(self.engine.layers)):  # one at a time: no more than one layer has two copies
            k_BGKC = self._key_layout(torch.zeros(B, G, K, capacity, **like))
            v_BGCK = torch.zeros(B, G, capacity, K, **like)
            if self.capacity:
                k_BGKC[..., : self.capacity] = self.keys[layer]
                v_BGCK[:, :, : self.capacity] = self.values[layer]
            self.keys[layer : layer + 1], self.values[layer : layer + 1] = [k_BGKC], [v_BGCK]
        self.capacity = capacity

    def retain(self, rows: list[int]) -> None:
        """Drop all other branches; `rows` must be ascending. Prefixes without branches free their keys and values."""
        kept_B = torch.tensor(rows)
        index = kept_B.to(self.engine.device)
        S = int(self.length_B.max())
        self.keys = [self._key_layout(k[index, :, :, : S + SPARE]) for k in self.keys]
        self.values = [v[index, :, : S + SPARE] for v in self.values]
        self.capacity = min(self.capacity, S + SPARE)
        self.start_B, self.length_B = self.start_B[kept_B], self.length_B[kept_B]
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
        """Put another tree's branches behind this one's, and its levels each beside one of alike lengths."""
        own = len(self.start_B)
        for layer in range(len(self.engine.layers)):
            self.keys[layer] = self._key_layout(beside(self.keys[layer], other.keys[layer], dim=-1))
            self.values[layer] = beside(self.values[layer], other.values[layer], dim=-2)
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
        free = [*self.levels]  # a branch is below one prefix of a level, so a tree's levels go to different ones
        for level in other.levels:
            level.index()
            length_P = level.length_P.tolist()
            place = next((held for held in free if alike([*held.length_P.tolist(), *length_P])), None)
            if place is None:
                self.levels.append(level)
            else:
                free.remove(place)
                place.join(level)


def beside(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Two tensors along the first dimension; the shorter one's slots, dimension `dim` (-1 or -2), are filled up."""
    longest = max(one.shape[dim], other.shape[dim])
    return torch.cat([F.pad(x, (*(0, 0) * (-1 - dim), 0, longest - x.shape[dim])) for x in (one, other)])


def causal(
    q_HTK: Tensor, k_GSK: Tensor, v_GSK: Tensor, position: int, key_position_S: Tensor, window: int | None
) -> Tensor:
    """Attention of T queries at positions position, position + 1, … → out_THK; blocks of queries see what they can.

    Keys are in rising order and end with the queries' own. On a CPU, bf16 scores are products of their own (the
    processor's bf16 instructions: half the time of torch's fused kernel, which multiplies in fp32).
    """
    T, S = q_HTK.shape[1], len(key_position_S)
    if S == T and (window is None or window >= T) and not grouped(q_HTK):
        k_1GSK, v_1GSK = (kept_GSK[None].to(q_HTK.dtype) for kept_GSK in (k_GSK, v_GSK))
        q_1HTK = q_HTK[None].contiguous()
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, is_causal=True, enable_gqa=True)
        return out_1HTK[0].transpose(0, 1)
    outs = []
    size = FEW if grouped(q_HTK) else BLOCK
    for start in range(0, T, size):
        stop = min(start + size, T)
        last = S - T + stop
        query_T1 = torch.arange(position + start, position + stop, device=q_HTK.device)[:, None]
        begin = 0 if window is None else int((key_position_S <= position + start - window).sum())
        held = slice(begin, last)
        seen_TS = key_position_S[held] <= query_T1
        if window is not None:
            seen_TS &= key_position_S[held] > query_T1 - window
        outs.append(block(q_HTK[:, start:stop], k_GSK[:, held], v_GSK[:, held], seen_TS))
    return torch.cat(outs, dim=1).transpose(0, 1)


def grouped(q_HTK: Tensor) -> bool:
    return q_HTK.dtype == torch.bfloat16 and q_HTK.device.type == "cpu"


def block(q_HTK: Tensor, k_GSK: Tensor, v_GSK: Tensor, seen_TS: Tensor) -> Tensor:
    """Attention of one block of queries → out_HTK."""
    (H, T, K), (G, S, _) = q_HTK.shape, k_GSK.shape
    k_GSK, v_GSK = k_GSK.to(q_HTK.dtype), v_GSK.to(q_HTK.dtype)  # a prefix may keep them narrower
    if not grouped(q_HTK):
        q_1HTK, k_1GSK, v_1GSK = q_HTK[None].contiguous(), k_GSK[None], v_GSK[None]
        return F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, attn_mask=seen_TS, enable_gqa=True)[0]
    q_GMK = (q_HTK * K**-0.5).reshape(G, H // G * T, K)
    score_HTS = torch.matmul(q_GMK, k_GSK.transpose(1, 2)).view(H, T, S).masked_fill_(~seen_TS, float("-inf"))
    weight_HTS = score_HTS.softmax(-1)  # computed in fp32, rounded once
    return torch.matmul(weight_HTS.view(G, H // G * T, S), v_GSK).view(H, T, K)
