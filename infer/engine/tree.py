"""Prompts as a tree: what several prompts begin with is computed and kept once.

Nine questions about a note share the note (and "### Question: "), all notes of a batch may share an instruction, which
is then computed once a batch:

    instruction ─┬─ note 1 ─┬─ question 1 → answer          a *node* is a stretch that is shared, or long
                 │          └─ question 2 → answer          a *leaf* is a prompt's own end and what it generates
                 └─ note 2 ─── …

Each leaf's queries look at their ancestors' keys and at their own. A node's keys are stored once and meet the queries
of all leaves below as rows of one product; the partial results o_i over disjoint keys with L_i = log Σ exp(score) merge
exactly (arXiv 2402.05099):   L = log Σ exp(L_i),   o = Σ exp(L_i − L) o_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from infer.engine.forward import Engine
from infer.engine.fuse import read_attention, tree_attention
from model.attention import share

SHARED = 8  # tokens: a shorter common stretch is cheaper to compute again than to attend to apart
OWN = 64  # tokens: a longer private stretch gets a node, so that leaves of a batch stay of similar length
BLOCK = 512  # queries of one attention call while prompts are read
FEW = 128  # the same where scores are products of their own
ROOM = 32  # slots by which leaves grow


@dataclass
class Node:
    """A stretch of tokens below `parent`; `leaves` are those below it, a range in the order of the tree."""

    parent: Node | None
    tokens: list[int]
    start: int  # the position of its first token
    leaves: range = range(0)
    first: int = 0  # the first position that is still held (a window lets older ones go)
    keys: list[Tensor] = field(default_factory=list)  # k_GSK of each layer
    values: list[Tensor] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[Node]:
        """The node and its ancestors, from the root."""
        return [*(self.parent.path() if self.parent else []), self]


@dataclass
class Leaf:
    """A prompt's own end: `tokens` (at least one) from position `start`; `prompt` is its index in the request."""

    parent: Node | None
    tokens: list[int]
    start: int
    prompt: int


def plan(prompts: Sequence[Sequence[int]]) -> tuple[list[Node], list[Leaf]]:
    """The tree of some prompts: nodes with parents before children, leaves in the tree's order."""
    nodes: list[Node] = []
    leaves: list[Leaf] = []
    if prompts:
        grow(prompts, nodes, leaves, list(range(len(prompts))), 0, None)
    return nodes, leaves


def grow(
    prompts: Sequence[Sequence[int]], nodes: list[Node], leaves: list[Leaf], indices: list[int], depth: int,
    parent: Node | None,
) -> None:  # fmt: skip
    """Enter the prompts of these indices, which are alike before `depth`, below `parent`."""
    # inside `plan` it would refer to itself, and keep the nodes' keys and values until Python looks for such cycles

    def add(parent: Node | None, tokens: Sequence[int], start: int) -> Node:
        nodes.append(Node(parent, list(tokens), start))
        return nodes[-1]

    ids = prompts[indices[0]]
    if len(indices) == 1:
        if len(ids) - depth > OWN and len(prompts) > 1:
            parent = add(parent, ids[depth:-1], depth)
            depth = len(ids) - 1
            parent.leaves = range(len(leaves), len(leaves) + 1)
        leaves.append(Leaf(parent, list(ids[depth:]), depth, indices[0]))
        return
    common = min(len(prompts[i]) for i in indices) - 1  # every leaf keeps a token of its own
    for i in indices[1:]:
        common = next((n for n in range(depth, common) if prompts[i][n] != ids[n]), common)
    began = len(leaves)
    node = parent
    if common - depth >= SHARED:
        node = add(parent, ids[depth:common], depth)
        depth = common
    groups: dict[int, list[int]] = {}
    for i in indices:
        # a group below starts where its prompts share more than the node; single ones are leaves
        groups.setdefault(hash(tuple(prompts[i][depth : depth + SHARED])), []).append(i)
    for group in groups.values():
        whole = len(group) > 1 and min(len(prompts[i]) for i in group) > depth + SHARED
        for part in [group] if whole else [[i] for i in group]:
            grow(prompts, nodes, leaves, part, depth, node)
    if node is not parent and node is not None:
        node.leaves = range(began, len(leaves))


class Cache:
    """Keys and values of a tree, and the attention over them."""

    def __init__(self, engine: Engine, nodes: list[Node], leaves: list[Leaf]) -> None:
        self.engine, self.nodes = engine, nodes
        self.windows = sorted(set(engine.config.windows), key=lambda w: (w is None, w))
        starts = [leaf.start for leaf in leaves]
        self.start_N = torch.tensor(starts, device=engine.device)  # position of a leaf's slot 0
        self.length_N = torch.zeros_like(self.start_N)
        self.keys: list[Tensor] = []  # k_NGKC of each layer: the leaves' own slots
        self.values: list[Tensor] = []  # v_NGCK
        self.capacity = 0
        self._read_nodes()

    # ---- reading the nodes -------------------------------------------------------------------------------------

    def _read_nodes(self) -> None:
        """Compute every node's keys and values: level by level, ragged, in passes of bounded size."""
        level = [node for node in self.nodes if node.parent is None]
        chunk = self.engine.chunk  # tokens of one pass: bounds the activations
        while level:
            pieces: list[tuple[Node, int, int]] = []
            size = 0
            for node in level:
                for begin in range(0, len(node.tokens), chunk):
                    end = min(begin + chunk, len(node.tokens))
                    if pieces and (size + end - begin > chunk or pieces[-1][0] is node):
                        self._read(pieces)
                        pieces, size = [], 0
                    pieces.append((node, begin, end))
                    size += end - begin
            self._read(pieces)
            level = [node for node in self.nodes if any(node.parent is above for above in level)]

    def _read(self, pieces: list[tuple[Node, int, int]]) -> None:
        device = self.engine.device
        tokens_N = torch.tensor([t for node, a, b in pieces for t in node.tokens[a:b]], device=device)
        position_N = torch.cat([torch.arange(node.start + a, node.start + b, device=device) for node, a, b in pieces])

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            outs, at = [], 0
            for node, a, b in pieces:
                rows = slice(at, at + b - a)
                at = rows.stop
                outs.append(self._read_attend(layer, node, a, q_NHK[rows], k_NGK[rows], v_NGK[rows]))
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        self.engine.forward(tokens_N, position_N, attend)
        bound = self.engine.config.window
        for node, _, b in pieces:
            if bound is not None and node.start + b - node.first > 2 * bound:
                drop = node.start + b - bound - node.first  # later queries see at most the window's last positions
                node.first += drop
                for held in (node.keys, node.values):
                    for layer, kept_GSK in enumerate(held):  # one at a time: nothing but a layer is held twice
                        held[layer] = kept_GSK[:, drop:].clone()

    def _read_attend(self, layer: int, node: Node, begin: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        k_GTK, v_GTK = (kept_TGK.transpose(0, 1).to(self.engine.cache_dtype) for kept_TGK in (k_TGK, v_TGK))
        if begin == 0:
            if layer == 0:
                node.first = node.start
            node.keys.append(k_GTK.contiguous())
            node.values.append(v_GTK.contiguous())
        else:
            node.keys[layer] = torch.cat([node.keys[layer], k_GTK], dim=1)
            node.values[layer] = torch.cat([node.values[layer], v_GTK], dim=1)
        path = node.path()
        keys = torch.cat([n.keys[layer] for n in path], dim=1) if len(path) > 1 else node.keys[layer]
        values = torch.cat([n.values[layer] for n in path], dim=1) if len(path) > 1 else node.values[layer]
        key_positions = [torch.arange(n.first, n.first + n.keys[layer].shape[1], device=q_THK.device) for n in path]
        key_position_S = torch.cat(key_positions)
        position = node.start + begin
        window = self.engine.layers[layer].window
        if self.engine.fused:
            return read_attention(q_THK, keys, values, position, key_position_S, window)
        return causal(q_THK.transpose(0, 1), keys, values, position, key_position_S, window)

    # ---- the leaves' steps -------------------------------------------------------------------------------------

    def step(self, tokens_NT: Tensor, count_N: Tensor) -> Tensor:
        """Enter up to T tokens of every leaf (count_N of them are real; the rest is padding) → x_NTD."""
        N, T = tokens_NT.shape
        self._make_room(T)
        slots_NT = self.length_N[:, None] + torch.arange(T, device=tokens_NT.device)
        position_NT = self.start_N[:, None] + slots_NT
        S = int(self.length_N.max()) + T
        key_position_NS = self.start_N[:, None] + torch.arange(S, device=tokens_NT.device)
        masks = {window: self._own_mask(window, slots_NT, S) for window in self.windows if not self.engine.fused}
        pieces = {window: self._reach(window, position_NT) for window in self.windows}
        rows_N1 = torch.arange(N, device=tokens_NT.device)[:, None]
        even = bool((self.length_N == self.length_N[0]).all())
        at = int(self.length_N[0])

        def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            G, K = k_NGK.shape[1:]
            k_NTGK, v_NTGK = k_NGK.view(N, T, G, K), v_NGK.unflatten(0, (N, T))
            if even:
                keys[:, :, :, at : at + T].copy_(k_NTGK.permute(0, 2, 3, 1))
                values[:, :, at : at + T].copy_(v_NTGK.transpose(1, 2))
            else:
                keys[rows_N1, :, :, slots_NT] = k_NTGK.to(keys.dtype)
                values[rows_N1, :, slots_NT] = v_NTGK.to(keys.dtype)
            window = self.engine.layers[layer].window
            q_NHTK = q_NHK.unflatten(0, (N, T)).transpose(1, 2)
            if self.engine.fused:
                prefixes = [(rows, n.keys[layer][:, s], n.values[layer][:, s], at) for n, rows, s, at in pieces[window]]
                held = keys[..., :S].mT, values[:, :, :S]
                out_NHTK = tree_attention(q_NHTK, *held, position_NT, key_position_NS, window, prefixes)
            else:
                out_NHTK = self._attend(layer, q_NHTK, S, masks[window], pieces[window])
            return out_NHTK.transpose(1, 2).flatten(0, 1)

        x_ND = self.engine.forward(tokens_NT.flatten(), position_NT.flatten(), attend)
        self.length_N = self.length_N + count_N
        return x_ND.view(N, T, -1)

    def _attend(self, layer: int, q_NHTK: Tensor, S: int, mask_NTS: Tensor | None, pieces: list) -> Tensor:
        N, H, T, K = q_NHTK.shape
        k_NGKS = self.keys[layer][:, :, :, :S].to(q_NHTK.dtype)  # the cache may be narrower
        v_NGSK = self.values[layer][:, :, :S].to(q_NHTK.dtype)
        if not pieces and N == 1 and T > 16:  # one prompt being read: it has no padding
            slot_S = torch.arange(S, device=q_NHTK.device)
            window = self.engine.layers[layer].window
            return causal(q_NHTK[0], k_NGKS[0].mT, v_NGSK[0], S - T, slot_S, window).transpose(0, 1)[None]
        if not pieces and T > 16:
            mask = None if mask_NTS is None else mask_NTS[:, None]
            return F.scaled_dot_product_attention(
                q_NHTK, share(k_NGKS.transpose(2, 3), H), share(v_NGSK, H), attn_mask=mask
            )
        G = k_NGKS.shape[1]
        q_NGMK = (q_NHTK * self.engine.scale).reshape(N, G, H // G * T, K)
        wide = torch.promote_types(q_NHTK.dtype, torch.float32)
        score_NGMS = torch.matmul(q_NGMK, k_NGKS)
        if mask_NTS is not None:
            score_NGMS = score_NGMS.view(N, G, -1, T, S).masked_fill(~mask_NTS[:, None, None], float("-inf"))
            score_NGMS = score_NGMS.view(N, G, -1, S)
        if not pieces:
            return torch.matmul(score_NGMS.softmax(-1, dtype=wide).to(v_NGSK.dtype), v_NGSK).view(N, H, T, K)
        out_NGMK, logsum_NGM1 = weigh(score_NGMS, v_NGSK, wide)
        for node, rows, keys, mask_nTS in pieces:
            n = rows.stop - rows.start
            k_GSK, v_GSK = (held[layer][:, keys].to(q_NHTK.dtype) for held in (node.keys, node.values))
            q_GMK = q_NGMK[rows].transpose(0, 1).reshape(G, -1, K)
            score_GMS = torch.matmul(q_GMK, k_GSK.transpose(1, 2))
            if mask_nTS is not None:
                seen = mask_nTS[:, None, :, :]  # the heads of a group see alike
                score_GMS = (
                    score_GMS.view(G, n, -1, T, score_GMS.shape[-1])
                    .masked_fill(~seen, float("-inf"))
                    .view(score_GMS.shape)
                )
            part_GMK, sum_GM1 = weigh(score_GMS, v_GSK, wide)
            part_nGMK = part_GMK.view(G, n, -1, K).transpose(0, 1)
            sum_nGM1 = sum_GM1.view(G, n, -1, 1).transpose(0, 1)
            total = torch.logaddexp(logsum_NGM1[rows], sum_nGM1)
            merged = out_NGMK[rows] * (logsum_NGM1[rows] - total).exp() + part_nGMK * (sum_nGM1 - total).exp()
            out_NGMK[rows], logsum_NGM1[rows] = merged.to(out_NGMK.dtype), total
        return out_NGMK.view(N, H, T, K).to(q_NHTK.dtype)  # the merge is in fp32 where that is wider

    def _own_mask(self, window: int | None, slots_NT: Tensor, S: int) -> Tensor | None:
        """Which of its own slots each query sees; None where all see all."""
        N, T = slots_NT.shape
        slot_S = torch.arange(S, device=slots_NT.device)
        if T == 1 and bool((slots_NT == S - 1).all()) and (window is None or window >= S):
            return None
        seen_NTS = slot_S <= slots_NT[..., None]
        return seen_NTS if window is None else seen_NTS & (slot_S > slots_NT[..., None] - window)

    def _reach(self, window: int | None, position_NT: Tensor) -> list[tuple[Node, slice, slice, Tensor | None]]:
        """(node, leaves, keys, mask) of the nodes that some leaf below them can still see; for the kernels, which mask
        by themselves, the keys' positions in the mask's place."""
        found = []
        for node in self.nodes:
            if not len(node.leaves):
                continue
            rows = slice(node.leaves.start, node.leaves.stop)
            oldest_nT = None if window is None else position_NT[rows] - window + 1
            first = node.first if oldest_nT is None else max(node.first, int(oldest_nT.min()))
            if first >= node.end:
                continue
            mask = None
            if self.engine.fused:
                mask = torch.arange(first, node.end, device=position_NT.device)
            elif oldest_nT is not None:
                seen_nTS = torch.arange(first, node.end, device=position_NT.device) >= oldest_nT[..., None]
                mask = None if bool(seen_nTS.all()) else seen_nTS
            found.append((node, rows, slice(first - node.first, None), mask))
        return found

    def _lay(self, k_NGKC: Tensor) -> Tensor:
        """As the scores' product reads keys, slot beside slot; the kernels read a key's numbers beside one another."""
        return k_NGKC.mT.contiguous().mT if self.engine.fused else k_NGKC.contiguous()

    def _make_room(self, T: int) -> None:
        need = int(self.length_N.max()) + T if len(self.length_N) else 0
        window = self.engine.config.window
        if window is not None and need > self.capacity and self.capacity:
            drop = int((self.length_N - window + 1).min())  # slots that no later query of any leaf sees
            if drop > 0:
                for layer, (k_NGKC, v_NGCK) in enumerate(zip(self.keys, self.values, strict=True)):
                    self.keys[layer], self.values[layer] = self._lay(k_NGKC[..., drop:]), v_NGCK[:, :, drop:].clone()
                self.start_N, self.length_N = self.start_N + drop, self.length_N - drop
                self.capacity, need = self.capacity - drop, need - drop
        if need <= self.capacity:
            return
        room = need + max(ROOM, need // 4)
        N, G, K = len(self.length_N), self.engine.groups, self.engine.head_dim
        like = {"dtype": self.engine.cache_dtype, "device": self.engine.device}
        for layer in range(len(self.engine.layers)):  # one at a time: nothing but a layer is held twice
            k_NGKC, v_NGCK = self._lay(torch.zeros(N, G, K, room, **like)), torch.zeros(N, G, room, K, **like)
            if self.capacity:
                k_NGKC[..., : self.capacity] = self.keys[layer]
                v_NGCK[:, :, : self.capacity] = self.values[layer]
            self.keys[layer : layer + 1], self.values[layer : layer + 1] = [k_NGKC], [v_NGCK]
        self.capacity = room

    def keep(self, rows: list[int]) -> None:
        """Go on with these leaves only (in rising order)."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.engine.device)
        S = int(self.length_N.max())
        self.keys = [self._lay(k[index, :, :, : S + ROOM]) for k in self.keys]
        self.values = [v[index, :, : S + ROOM] for v in self.values]
        self.capacity = min(self.capacity, S + ROOM)
        self.start_N, self.length_N = self.start_N[index], self.length_N[index]
        for node in self.nodes:
            below = [new for new, old in enumerate(rows) if old in node.leaves]
            node.leaves = range(below[0], below[-1] + 1) if below else range(0)
            if not below:
                node.keys, node.values = [], []


def weigh(score: Tensor, values: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(softmax(score) · values, log Σ exp(score)), zeros and −∞ for a query that sees nothing here."""
    score = score.to(wide)
    top = score.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weight = (score - top).exp_()
    total = weight.sum(-1, keepdim=True)
    out = torch.matmul(weight.to(values.dtype), values) / total.clamp_min(torch.finfo(wide).tiny)
    return out, top + total.log()


def causal(
    q_HTK: Tensor, k_GSK: Tensor, v_GSK: Tensor, position: int, key_position_S: Tensor, window: int | None
) -> Tensor:
    """Attention of T queries at positions position, position + 1, … → out_THK; blocks of queries see what they can.

    Keys are in rising order and end with the queries' own. On a CPU, bf16 scores are products of their own (the
    processor's bf16 instructions: half the time of torch's fused kernel, which multiplies in fp32).
    """
    T, S = q_HTK.shape[1], len(key_position_S)
    if S == T and (window is None or window >= T) and not grouped(q_HTK):
        k_1HSK, v_1HSK = (share(kept_GSK[None].to(q_HTK.dtype), len(q_HTK)) for kept_GSK in (k_GSK, v_GSK))
        out_1HTK = F.scaled_dot_product_attention(q_HTK[None].contiguous(), k_1HSK, v_1HSK, is_causal=True)
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
    k_GSK, v_GSK = k_GSK.to(q_HTK.dtype), v_GSK.to(q_HTK.dtype)  # a node may keep them narrower
    if not grouped(q_HTK):
        k_1HSK, v_1HSK = share(k_GSK[None], H), share(v_GSK[None], H)
        return F.scaled_dot_product_attention(q_HTK[None].contiguous(), k_1HSK, v_1HSK, attn_mask=seen_TS)[0]
    q_GMK = (q_HTK * K**-0.5).reshape(G, H // G * T, K)
    score_HTS = torch.matmul(q_GMK, k_GSK.transpose(1, 2)).view(H, T, S).masked_fill_(~seen_TS, float("-inf"))
    weight_HTS = score_HTS.softmax(-1, dtype=torch.float32).to(q_HTK.dtype)
    return torch.matmul(weight_HTS.view(G, H // G * T, S), v_GSK).view(H, T, K)
