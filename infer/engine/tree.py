"""Prompts as a tree: what several prompts begin with is computed and kept once.

Nine questions about a note share the note (and "### Question: "), all notes of a batch may share an instruction, which
is then computed once a batch:

    instruction ─┬─ note 1 ─┬─ question 1 → answer          a *node* is a stretch that is shared, or long
                 │          └─ question 2 → answer          a *leaf* is a prompt's own end and what it generates
                 └─ note 2 ─── …

Each leaf's queries see their ancestors' keys and their own. A node's keys are stored once and meet the queries of all
leaves below as rows of one product; a level's nodes are padded to one length, so that a level is one product for the
scores and one for the values, however many notes there are. The scores of all levels and of the leaves' own slots lie
side by side in one tensor, and one softmax over it is the definition's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.attention
from infer.engine.forward import Engine
from infer.engine.fuse import read_attention, tree_attention
from model.attention import repeat_kv

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


@dataclass
class Level:
    """Adjacent nodes of one depth: their keys and values padded to one length, side by side.

    `leaf_Mn` are the leaves below each node (M nodes, at most n leaves each; the places beyond a node's own repeat a
    leaf), `place_r` is where each of the leaves `rows` lies among them, flattened. Those below none of the nodes lie
    anywhere: `below_r` is False, and the mask hides the level from them.
    """

    nodes: list[Node]
    keys: list[Tensor]  # k_MGSK of each layer
    values: list[Tensor]  # v_MGSK
    first_M: Tensor  # the position of each node's first held token; like all that is known beforehand, in the host's
    length_M: Tensor  # memory: asking a device for a number would wait for it. Held tokens of each node
    rows: slice = field(default_factory=lambda: slice(0))
    leaf_Mn: Tensor | None = None
    place_r: Tensor | None = None
    below_r: Tensor | None = None
    apart_r: Tensor | None = None  # its opposite, on the device
    node_r: Tensor | None = None  # the node above each of the leaves
    start_M: Tensor | None = None  # the first leaf below each node and their number, int32 on the device, for the
    count_M: Tensor | None = None  # kernels
    even: bool = False  # every leaf once, in order: nothing needs to be gathered

    def index(self) -> None:
        """Find `rows` and the index tensors from the nodes' ranges of leaves."""
        ranges = [node.leaves for node in self.nodes]
        start, stop = ranges[0].start, ranges[-1].stop
        n = max(map(len, ranges))
        self.rows = slice(start, stop)
        places = {leaf: m * n + i for m, below in enumerate(ranges) for i, leaf in enumerate(below)}
        device = self.keys[0].device
        leaves = [[below[min(i, len(below) - 1)] - start for i in range(n)] for below in ranges]
        self.leaf_Mn = torch.tensor(leaves, device=device)
        self.node_r = torch.tensor([places.get(leaf, 0) // n for leaf in range(start, stop)])
        self.place_r = torch.tensor([places.get(leaf, 0) for leaf in range(start, stop)], device=device)
        self.below_r = torch.tensor([leaf in places for leaf in range(start, stop)])
        self.apart_r = ~self.below_r.to(device)
        self.start_M, self.count_M = torch.tensor(
            [[below.start for below in ranges], [len(below) for below in ranges]], dtype=torch.int32, device=device
        )
        self.even = len(places) == stop - start == self.leaf_Mn.numel()

    def retain(self) -> None:
        """Free the nodes that have no leaf left, and index the others anew."""
        kept = [m for m, node in enumerate(self.nodes) if len(node.leaves)]
        if len(kept) < len(self.nodes):
            self.nodes = [self.nodes[m] for m in kept]
            longest = int(self.length_M[kept].max()) if kept else 0
            for store in (self.keys, self.values):
                for layer, held_MGSK in enumerate(store):
                    store[layer] = held_MGSK[kept, :, :longest]
            self.first_M, self.length_M = self.first_M[kept], self.length_M[kept]
        if kept:
            self.index()

    def product(self, x_rGMA: Tensor, y_MGAB: Tensor) -> Tensor:
        """Each leaf's rows times its node's matrix: (r, G, M, A) × (nodes, G, A, B) → (r, G, M, B)."""
        nodes, n = self.leaf_Mn.shape
        r, G, M, A = x_rGMA.shape
        x_MnGMA = (x_rGMA if self.even else x_rGMA[self.leaf_Mn.flatten()]).view(nodes, n, G, M, A)
        out_MGnMB = torch.matmul(x_MnGMA.transpose(1, 2).reshape(nodes, G, n * M, A), y_MGAB)
        out_MnGMB = out_MGnMB.view(nodes, G, n, M, -1).transpose(1, 2)
        if self.even:
            return out_MnGMB.flatten(0, 1)
        return out_MnGMB.flatten(0, 1)[self.place_r].masked_fill_(self.apart_r[:, None, None, None], 0)


def levels_of(nodes: list[Node]) -> Iterator[list[Node]]:
    """Nodes that become a Level: of one depth, adjacent, and of lengths alike enough that padding at most doubles."""
    depth = [node for node in nodes if node.parent is None]
    while depth:
        group: list[Node] = []
        for node in (node for node in depth if len(node.leaves)):
            lengths = [len(each.keys[0][0]) for each in (*group, node)]
            if group and max(lengths) * len(lengths) > 2 * sum(lengths):
                yield group
                group = []
            group.append(node)
        if group:
            yield group
        above = {id(node) for node in depth}
        depth = [node for node in nodes if id(node.parent) in above]


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
        self.start_N = torch.tensor(starts)  # position of a leaf's slot 0, in the host's memory as all lengths
        self.length_N = torch.zeros_like(self.start_N)
        self.keys: list[Tensor] = []  # k_NGKC of each layer: the leaves' own slots
        self.values: list[Tensor] = []  # v_NGCK
        self.capacity = 0
        self._read_nodes()
        self.levels = [self._pad(group) for group in levels_of(nodes)]

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
        device = tokens_NT.device
        slots_NT = self.length_N[:, None] + torch.arange(T)
        position_NT = self.start_N[:, None] + slots_NT
        S = int(self.length_N.max()) + T
        key_position_NS = self.start_N[:, None] + torch.arange(S)
        reach = {window: self._reach(window, position_NT) for window in self.windows}
        masks = {}
        if self.engine.fused:  # the kernels mask by themselves
            positions = {window: self._key_positions(reach[window]) for window in self.windows}
        else:
            masks = {window: self._mask(window, position_NT, slots_NT, S, reach[window]) for window in self.windows}
            masks = {w: None if hidden is None else hidden.to(device) for w, hidden in masks.items()}
        rows_N1 = torch.arange(N, device=device)[:, None]
        even = bool((self.length_N == self.length_N[0]).all())
        at = int(self.length_N[0])
        slots_NT, position_NT, key_position_NS = (x.to(device) for x in (slots_NT, position_NT, key_position_NS))

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
                levels = self._kernel_levels(layer, reach[window], positions[window])
                held = keys[..., :S].mT, values[:, :, :S]
                out_NHTK = tree_attention(q_NHTK, *held, position_NT, key_position_NS, window, levels)
            else:
                out_NHTK = self._attend(layer, q_NHTK, S, masks[window], reach[window])
            return out_NHTK.transpose(1, 2).flatten(0, 1)

        x_ND = self.engine.forward(tokens_NT.flatten(), position_NT.flatten(), attend)
        self.length_N = self.length_N + count_N
        return x_ND.view(N, T, -1)

    def _attend(
        self, layer: int, q_NHTK: Tensor, S: int, hidden_NTA: Tensor | None, reach: list[tuple[Level, int]]
    ) -> Tensor:
        """Attention of the leaves' new tokens over all A keys within reach: every level's, then the S own slots."""
        N, H, T, K = q_NHTK.shape
        k_NGKS = self.keys[layer][:, :, :, :S].to(q_NHTK.dtype)  # the cache may be narrower
        v_NGSK = self.values[layer][:, :, :S].to(q_NHTK.dtype)
        if not reach and N == 1 and T > 16:  # one prompt being read: it has no padding
            slot_S = torch.arange(S, device=q_NHTK.device)
            window = self.engine.layers[layer].window
            return causal(q_NHTK[0], k_NGKS[0].mT, v_NGSK[0], S - T, slot_S, window).transpose(0, 1)[None]
        G = k_NGKS.shape[1]
        q_NGMK = (q_NHTK * self.engine.scale).reshape(N, G, H // G * T, K)
        sizes = [level.keys[layer].shape[2] - begin for level, begin in reach]
        score_NGMA = q_NGMK.new_empty(N, G, H // G * T, sum(sizes) + S)
        at = 0
        for (level, begin), size in zip(reach, sizes, strict=True):
            k_mGSK = level.keys[layer][:, :, begin:].to(q_NHTK.dtype)
            score_NGMA[level.rows, ..., at : at + size] = level.product(q_NGMK[level.rows], k_mGSK.mT)
            at += size
        score_NGMA[..., at:] = torch.matmul(q_NGMK, k_NGKS)
        if hidden_NTA is not None:
            score_NGMA.view(N, G, -1, T, at + S).masked_fill_(hidden_NTA[:, None, None], float("-inf"))
        wide = torch.promote_types(q_NHTK.dtype, torch.float32)
        weight_NGMA = score_NGMA.softmax(-1, dtype=wide).to(v_NGSK.dtype)
        out_NGMK = torch.matmul(weight_NGMA[..., at:], v_NGSK)
        at = 0
        for (level, begin), size in zip(reach, sizes, strict=True):
            v_mGSK = level.values[layer][:, :, begin:].to(q_NHTK.dtype)
            out_NGMK[level.rows].add_(level.product(weight_NGMA[level.rows, ..., at : at + size], v_mGSK))
            at += size
        return out_NGMK.view(N, H, T, K)

    def _mask(
        self, window: int | None, position_NT: Tensor, slots_NT: Tensor, S: int, reach: list[tuple[Level, int]]
    ) -> Tensor | None:
        """hidden_NTA, true where a query does not see a key (as `_attend` lays keys out); None where all see all."""
        N, T = slots_NT.shape
        parts = []
        for level, begin in reach:
            length = level.keys[0].shape[2]
            index_S = torch.arange(begin, length)
            held_MS = index_S < level.length_M[:, None]
            seen_rTS = (held_MS[level.node_r] & level.below_r[:, None])[:, None].expand(-1, T, -1)
            if window is not None:
                key_position_rS = level.first_M[level.node_r, None] + index_S
                seen_rTS = seen_rTS & (key_position_rS[:, None] > position_NT[level.rows][..., None] - window)
            seen_NTS = seen_rTS.new_zeros(N, T, length - begin)
            seen_NTS[level.rows] = seen_rTS
            parts.append(seen_NTS)
        slot_S = torch.arange(S)
        seen_NTS = slot_S <= slots_NT[..., None]
        parts.append(seen_NTS if window is None else seen_NTS & (slot_S > slots_NT[..., None] - window))
        hidden_NTA = ~torch.cat(parts, dim=-1)
        return hidden_NTA if bool(hidden_NTA.any()) else None

    def _reach(self, window: int | None, position_NT: Tensor) -> list[tuple[Level, int]]:
        """(level, the first key) of the levels that some leaf below them can still see through the window."""
        if window is None:
            return [(level, 0) for level in self.levels]
        oldest = int(position_NT.min()) - window + 1
        found = []
        for level in self.levels:
            begin = max(0, oldest - int(level.first_M.max()))
            if begin < level.keys[0].shape[2] and oldest < max(node.end for node in level.nodes):
                found.append((level, begin))
        return found

    def _key_positions(self, reach: list[tuple[Level, int]]) -> list[Tensor]:
        """position_MS of each level's keys within reach (int32; −1 where a node has no key), for the kernels' masks."""
        found = []
        for level, begin in reach:
            index_S = torch.arange(begin, level.keys[0].shape[2])
            position_MS = level.first_M[:, None] + index_S
            position_MS = torch.where(index_S < level.length_M[:, None], position_MS, -1)
            found.append(position_MS.to(self.engine.device, torch.int32))
        return found

    def _kernel_levels(
        self, layer: int, reach: list[tuple[Level, int]], positions: list[Tensor]
    ) -> list[kernels.attention.Level]:
        """The levels within reach as kernels.tree_attention takes them."""
        return [
            kernels.attention.Level(
                level.keys[layer][:, :, begin:], level.values[layer][:, :, begin:], position_MS, level.start_M,
                level.count_M, level.leaf_Mn.shape[1],
            )
            for (level, begin), position_MS in zip(reach, positions, strict=True)
        ]  # fmt: skip

    def _pad(self, nodes: list[Node]) -> Level:
        """The nodes' keys and values in one tensor a layer, one layer at a time; the nodes give theirs up."""
        lengths = [node.keys[0].shape[1] for node in nodes]
        level = Level(nodes, [], [], torch.tensor([node.first for node in nodes]), torch.tensor(lengths))
        for layer in range(len(self.engine.layers)):
            for store, name in ((level.keys, "keys"), (level.values, "values")):
                held = [getattr(node, name)[layer] for node in nodes]
                padded_MGSK = held[0].new_zeros(len(nodes), held[0].shape[0], max(lengths), held[0].shape[2])
                for m, (node, kept_GSK) in enumerate(zip(nodes, held, strict=True)):
                    padded_MGSK[m, :, : lengths[m]] = kept_GSK
                    getattr(node, name)[layer] = kept_GSK.new_empty(0)  # not a view, which would keep the storage
                store.append(padded_MGSK)
        level.index()
        return level

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

    def retain(self, rows: list[int]) -> None:
        """Drop all other leaves; `rows` must be ascending. Nodes without leaves free their keys and values."""
        kept_N = torch.tensor(rows)
        index = kept_N.to(self.engine.device)
        S = int(self.length_N.max())
        self.keys = [self._lay(k[index, :, :, : S + ROOM]) for k in self.keys]
        self.values = [v[index, :, : S + ROOM] for v in self.values]
        self.capacity = min(self.capacity, S + ROOM)
        self.start_N, self.length_N = self.start_N[kept_N], self.length_N[kept_N]
        for node in self.nodes:
            below = [new for new, old in enumerate(rows) if old in node.leaves]
            node.leaves = range(below[0], below[-1] + 1) if below else range(0)
        for level in self.levels:
            level.retain()
        self.levels = [level for level in self.levels if level.nodes]


def causal(
    q_HTK: Tensor, k_GSK: Tensor, v_GSK: Tensor, position: int, key_position_S: Tensor, window: int | None
) -> Tensor:
    """Attention of T queries at positions position, position + 1, … → out_THK; blocks of queries see what they can.

    Keys are in rising order and end with the queries' own. On a CPU, bf16 scores are products of their own (the
    processor's bf16 instructions: half the time of torch's fused kernel, which multiplies in fp32).
    """
    T, S = q_HTK.shape[1], len(key_position_S)
    if S == T and (window is None or window >= T) and not grouped(q_HTK):
        k_1HSK, v_1HSK = (repeat_kv(kept_GSK[None].to(q_HTK.dtype), len(q_HTK)) for kept_GSK in (k_GSK, v_GSK))
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
        k_1HSK, v_1HSK = repeat_kv(k_GSK[None], H), repeat_kv(v_GSK[None], H)
        return F.scaled_dot_product_attention(q_HTK[None].contiguous(), k_1HSK, v_1HSK, attn_mask=seen_TS)[0]
    q_GMK = (q_HTK * K**-0.5).reshape(G, H // G * T, K)
    score_HTS = torch.matmul(q_GMK, k_GSK.transpose(1, 2)).view(H, T, S).masked_fill_(~seen_TS, float("-inf"))
    weight_HTS = score_HTS.softmax(-1, dtype=torch.float32).to(q_HTK.dtype)
    return torch.matmul(weight_HTS.view(G, H // G * T, S), v_GSK).view(H, T, K)
