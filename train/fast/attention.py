"""Attention for training rows, by segments: hardly more than the pairs of tokens that see each other are computed.

A row of train/data/rows.py holds documents; a document is a trunk and branches, each a run of tokens with running
positions. A mask over the whole row computes T² pairs, of which most are then masked out. Here (n trunk tokens,
branches of m) the row's queries are taken about a hundred at a time, each with all the keys that any of them sees, and
a mask:

    a piece of the trunk        on the trunk up to its end
    some whole branches         on the trunk and on these branches

A note of 400 tokens with eight questions of 40: 252,160 pairs in place of 518,400, of which 214,400 are needed;
fewer and larger products pay better than the last of them. A query's keys are all in one product, so that its softmax
is one, and backward makes it again: what is kept is q, k and v.

On a CPU, for rows whose documents are shorter than the window; everything else goes to `FastAttend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.fast_attention import FastAttend
from model.mask import Visible

QUERIES = 96  # queries at once, about: few enough that not many pairs are masked, enough for products to pay


@dataclass(frozen=True)
class Part:
    """Queries that are computed at once, the keys that any of them sees, and who sees whom: 0 or −∞, (t, s)."""

    queries: slice
    keys: tuple[slice, ...]
    bias_ts: Tensor


@dataclass(frozen=True)
class Segment:
    """One document of one row: where its trunk and each of its branches lie."""

    row: int
    trunk: slice
    branches: tuple[slice, ...]

    def parts(self) -> list[Part]:
        """Every query of the document once."""
        made = []
        for start in range(self.trunk.start, self.trunk.stop, QUERIES):
            stop = min(start + QUERIES, self.trunk.stop)
            made.append(
                Part(
                    slice(start, stop), (slice(self.trunk.start, stop),), causal(stop - start, stop - self.trunk.start)
                )
            )
        group: list[slice] = []
        for branch in self.branches:
            if group and branch.stop - group[0].start > QUERIES:
                made.append(self.beside(group))
                group = []
            group.append(branch)
        return [*made, self.beside(group)] if group else made

    def beside(self, group: list[slice]) -> Part:
        """Whole branches on the trunk and on themselves; they do not see each other."""
        first, own = group[0].start, slice(group[0].start, group[-1].stop)
        length = self.trunk.stop - self.trunk.start
        bias_ts = torch.full((own.stop - first, length + own.stop - first), float("-inf"))
        bias_ts[:, :length] = 0.0
        for branch in group:
            rows = slice(branch.start - first, branch.stop - first)
            bias_ts[rows, length + rows.start : length + rows.stop] = causal(rows.stop - rows.start)
        return Part(own, (self.trunk, own), bias_ts)


def causal(queries: int, keys: int | None = None) -> Tensor:
    """The bias of `queries` last tokens on `keys` up to them."""
    keys = queries if keys is None else keys
    return torch.full((queries, keys), float("-inf")).triu_(1 + keys - queries)


def segments(visible: Visible, window: int | None) -> list[Segment] | None:
    """The documents of these rows, or None where they are not runs of tokens in reach of each other."""
    if visible.layout is None or visible.offset or visible.layout is not visible.key_layout:
        return None
    rows = zip(
        *(x.tolist() for x in (visible.layout.document_BT, visible.layout.branch_BT, visible.position_BT)), strict=True
    )
    found: list[Segment] = []
    for row, (document_T, branch_T, position_T) in enumerate(rows):
        runs = cut(document_T, branch_T, position_T)
        if runs is None or (window is not None and max(position_T) >= window):
            return None
        found += [Segment(row, trunk, tuple(branches)) for trunk, branches in runs]
    return found


def cut(document_T: list[int], branch_T: list[int], position_T: list[int]) -> list[tuple[slice, list[slice]]] | None:
    """One row's (trunk, branches) by document; None where positions do not run on within trunk and branches."""
    found: list[tuple[slice, list[slice]]] = []
    seen: set[int] = set()
    start, length = 0, len(document_T)
    for end in range(1, length + 1):
        if end < length and (document_T[end], branch_T[end]) == (document_T[start], branch_T[start]):
            if document_T[start] != -1 and position_T[end] != position_T[end - 1] + 1:
                return None
            continue
        run, document = slice(start, end), document_T[start]
        if document != -1:
            if document not in seen:
                seen.add(document)
                found.append((run, []) if branch_T[start] == 0 else (slice(start, start), [run]))
            elif document == document_T[start - 1] and branch_T[start]:
                found[-1][1].append(run)
            else:
                return None  # a document in pieces, or a trunk behind its branches
            trunk = found[-1][0]
            if branch_T[start] and position_T[start] != (
                position_T[trunk.stop - 1] + 1 if trunk.stop > trunk.start else position_T[start]
            ):
                return None
        start = end
    return found


class SegmentedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √K) v over the parts; padding gets zeros. q (B, H, T, K), k and v (B, G, T, K).

    Scores and weights have q's dtype, as in the plain path; sums and softmax are formed in at least fp32.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, found: list[tuple[int, Part]]) -> Tensor:
        B, H, T, K = q_BHTK.shape
        out_BTHK = q_BHTK.new_zeros(B, T, H, K)
        for row, part in found:
            q_GNK, k_GsK, v_GsK = gathered(part, q_BHTK[row], k_BGTK[row], v_BGTK[row])
            out_GNK = torch.bmm(weights(part, q_GNK, k_GsK), v_GsK)
            out_BTHK[row, part.queries] = spread(out_GNK, H).transpose(0, 1)
        ctx.found = found
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK)
        return out_BTHK.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:  # type: ignore[override]
        q_BHTK, k_BGTK, v_BGTK = ctx.saved_tensors
        (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
        dq_BTHK = q_BHTK.new_zeros(B, T, H, K)
        dk_BTGK, dv_BTGK = (q_BHTK.new_zeros(B, T, G, K) for _ in range(2))
        for row, part in ctx.found:
            q_GNK, k_GsK, v_GsK = gathered(part, q_BHTK[row], k_BGTK[row], v_BGTK[row])
            grad_GNK = grad_BHTK[row, :, part.queries].reshape(q_GNK.shape)
            weight_GNs = weights(part, q_GNK, k_GsK)
            dv_GsK = torch.bmm(weight_GNs.transpose(1, 2), grad_GNK)
            d_weight_GNs = torch.bmm(grad_GNK, v_GsK.transpose(1, 2))
            d_score_GNs = torch._softmax_backward_data(d_weight_GNs, weight_GNs, -1, weight_GNs.dtype)
            dq_GNK = torch.bmm(d_score_GNs, k_GsK).mul_(K**-0.5)
            dk_GsK = torch.bmm(d_score_GNs.transpose(1, 2), q_GNK).mul_(K**-0.5)
            dq_BTHK[row, part.queries] = spread(dq_GNK, H).transpose(0, 1)
            start = 0
            for keys in part.keys:
                stop = start + keys.stop - keys.start
                dk_BTGK[row, keys] += dk_GsK[:, start:stop].transpose(0, 1)
                dv_BTGK[row, keys] += dv_GsK[:, start:stop].transpose(0, 1)
                start = stop
        return dq_BTHK.transpose(1, 2), dk_BTGK.transpose(1, 2), dv_BTGK.transpose(1, 2), None


def gathered(part: Part, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A part's queries, a group's heads below each other (G, N = H/G · t, K), and its keys and values (G, s, K)."""
    k_GsK, v_GsK = (
        x_GTK[:, part.keys[0]] if len(part.keys) == 1 else torch.cat([x_GTK[:, keys] for keys in part.keys], 1)
        for x_GTK in (k_GTK, v_GTK)
    )
    return q_HTK[:, part.queries].reshape(k_GTK.shape[0], -1, q_HTK.shape[-1]), k_GsK, v_GsK


def spread(x_GNK: Tensor, heads: int) -> Tensor:
    """(H, t, K) out of (G, H/G · t, K)."""
    return x_GNK.reshape(heads, -1, x_GNK.shape[-1])


def weights(part: Part, q_GNK: Tensor, k_GsK: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + bias): (G, N, s)."""
    G, N, K = q_GNK.shape
    bias_Ns = part.bias_ts.to(q_GNK.dtype).repeat(N // part.bias_ts.shape[0], 1)
    return torch.softmax(torch.baddbmm(bias_Ns.expand(G, -1, -1), q_GNK, k_GsK.transpose(1, 2), alpha=K**-0.5), -1)


class SegmentAttend(FastAttend):
    """FastAttend, by segments where the rows allow it."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        held = visible.__dict__.setdefault("segments", {})  # the same for every layer of this window
        if window not in held:
            found = segments(visible, window) if q_BHTK.is_cpu else None
            held[window] = None if found is None else [(one.row, part) for one in found for part in one.parts()]
        if held[window] is None:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        return SegmentedAttention.apply(q_BHTK, k_BGSK, v_BGSK, held[window])
