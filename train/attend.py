"""Attention for training rows, by segments: only pairs of tokens that see each other are computed.

A row of train/rows.py holds documents; a document is a trunk and branches, each a run of tokens with running positions.
A mask over the whole row computes T² pairs, of which most are then masked out. Here (n trunk tokens, branches of m):

    trunk on trunk      causal                                     n²/2
    branches on trunk   every branch token sees all of it          n · Σ m
    branch on itself    causal                                     Σ m²/2

A note of 400 tokens with eight questions of 40: 214,000 pairs in place of 518,000. A branch token's two parts are
joined by their log-sums l: out = Σ out_i exp(l_i − l), l = log Σ exp l_i. Backward, each part's weights are made again:
exp(score − l) with the joint l. What is kept is q, k, v, out and l: O(T).

On a CPU, for rows whose documents are shorter than the window; everything else goes to `FastAttend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention import Visible
from model.fast_attention import FastAttend

QUERIES = 64  # queries of a run at once: small enough that few pairs beyond the diagonal are computed


@dataclass(frozen=True)
class Segment:
    """One document of one row: where its trunk and each of its branches lie."""

    row: int
    trunk: slice
    branches: tuple[slice, ...]

    def parts(self) -> list[tuple[slice, slice, bool]]:
        """(queries, keys, causal) of each product: every pair that sees each other, once (and half a block more)."""
        made = []
        for run in (self.trunk, *self.branches):
            for start in range(run.start, run.stop, QUERIES):
                queries = slice(start, min(start + QUERIES, run.stop))
                if start > run.start:
                    made.append((queries, slice(run.start, start), False))
                made.append((queries, queries, True))
        if self.branches and self.trunk.stop > self.trunk.start:
            made.append((slice(self.branches[0].start, self.branches[-1].stop), self.trunk, False))
        return made


def segments(visible: Visible, window: int | None) -> list[Segment] | None:
    """The documents of these rows, or None where they are not runs of tokens in reach of each other."""
    if visible.layout is None or visible.offset or visible.layout is not visible.key_layout:
        return None
    rows = zip(*(x.tolist() for x in (visible.layout.document_BT, visible.layout.branch_BT, visible.position_BT)),
               strict=True)  # fmt: skip
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
            if branch_T[start] and position_T[start] != (position_T[trunk.stop - 1] + 1 if trunk.stop > trunk.start
                                                         else position_T[start]):  # fmt: skip
                return None
        start = end
    return found


class SegmentedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √K) v over the pairs of the segments; padding gets zeros. q (B, H, T, K), k and v (B, G, T, K)."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, found: list[Segment]) -> Tensor:
        B, H, T, K = q_BHTK.shape
        wide = torch.promote_types(q_BHTK.dtype, torch.float32)
        out_BTHK = q_BHTK.new_zeros(B, T, H, K)
        log_sum_BHT = q_BHTK.new_full((B, H, T), float("-inf"), dtype=wide)
        for segment in found:
            q_GRTK = grouped(q_BHTK[segment.row], k_BGTK.shape[1])
            out_GRTK = grouped(out_BTHK[segment.row].transpose(0, 1), k_BGTK.shape[1])
            log_sum_GRT = log_sum_BHT[segment.row].view(q_GRTK.shape[:3])
            for queries, keys, causal in segment.parts():
                score_GRts = scores(q_GRTK[:, :, queries], k_BGTK[segment.row, :, keys], causal)
                largest_GRt = score_GRts.amax(-1)
                weight_GRts = score_GRts.sub_(largest_GRt[..., None]).exp_()
                sum_GRt = weight_GRts.sum(-1)
                before_GRt, held_GRtK = log_sum_GRT[:, :, queries], out_GRTK[:, :, queries]
                part_GRt = largest_GRt + sum_GRt.log()
                joined_GRt = torch.logaddexp(before_GRt, part_GRt)
                added_GRtK = product(weight_GRts.to(q_BHTK.dtype), v_BGTK[segment.row, :, keys])
                held_GRtK.mul_((before_GRt - joined_GRt).exp().to(q_BHTK.dtype)[..., None])
                held_GRtK.addcmul_(added_GRtK, ((part_GRt - joined_GRt).exp() / sum_GRt).to(q_BHTK.dtype)[..., None])
                before_GRt.copy_(joined_GRt)
        ctx.found = found
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, out_BTHK, log_sum_BHT)
        return out_BTHK.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:  # type: ignore[override]
        q_BHTK, k_BGTK, v_BGTK, out_BTHK, log_sum_BHT = ctx.saved_tensors
        (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
        dq_BTHK = q_BHTK.new_zeros(B, T, H, K)
        dk_BTGK, dv_BTGK = (q_BHTK.new_zeros(B, T, G, K) for _ in range(2))
        wide = log_sum_BHT.dtype
        # what softmax's gradient subtracts from each row: Σ_s weight · d weight = out · d out
        inner_BHT = (grad_BHTK.to(wide) * out_BTHK.transpose(1, 2).to(wide)).sum(-1)
        for segment in ctx.found:
            row = segment.row
            q_GRTK, grad_GRTK, dq_GRTK = (grouped(x, G) for x in (q_BHTK[row], grad_BHTK[row],
                                                                  dq_BTHK[row].transpose(0, 1)))  # fmt: skip
            log_sum_GRT, inner_GRT = (x[row].view(q_GRTK.shape[:3]) for x in (log_sum_BHT, inner_BHT))
            dk_GTK, dv_GTK = dk_BTGK[row].transpose(0, 1), dv_BTGK[row].transpose(0, 1)
            for queries, keys, causal in segment.parts():
                k_GsK, v_GsK = k_BGTK[row, :, keys], v_BGTK[row, :, keys]
                q_GRtK, grad_GRtK = q_GRTK[:, :, queries], grad_GRTK[:, :, queries]
                weight_GRts = scores(q_GRtK, k_GsK, causal).sub_(log_sum_GRT[:, :, queries, None]).exp_()
                d_score_GRts = product(grad_GRtK, v_GsK.transpose(1, 2)).to(wide).sub_(inner_GRT[:, :, queries, None])
                d_score_GRts = d_score_GRts.mul_(weight_GRts).mul_(K**-0.5).to(q_BHTK.dtype)
                dq_GRTK[:, :, queries] += product(d_score_GRts, k_GsK)
                dk_GTK[:, keys] += outer(d_score_GRts, q_GRtK)
                dv_GTK[:, keys] += outer(weight_GRts.to(q_BHTK.dtype), grad_GRtK)
        return dq_BTHK.transpose(1, 2), dk_BTGK.transpose(1, 2), dv_BTGK.transpose(1, 2), None


def grouped(x_HTK: Tensor, groups: int) -> Tensor:
    """(G, H/G, T, K): the query heads that share a group's keys lie side by side."""
    return x_HTK.unflatten(0, (groups, x_HTK.shape[0] // groups))


def product(a_GRts: Tensor, b_GsK: Tensor) -> Tensor:
    """a b for every query head of a group, as one product of R·t rows."""
    G, R, t, s = a_GRts.shape
    return torch.bmm(a_GRts.reshape(G, R * t, s), b_GsK).view(G, R, t, -1)


def outer(a_GRts: Tensor, b_GRtK: Tensor) -> Tensor:
    """Σ over a group's query heads and queries of aᵀ b: (G, s, K)."""
    return torch.bmm(a_GRts.flatten(1, 2).transpose(1, 2), b_GRtK.flatten(1, 2))


def scores(q_GRtK: Tensor, k_GsK: Tensor, causal: bool) -> Tensor:
    """q kᵀ / √K in at least fp32, −∞ where a query does not see a key."""
    score_GRts = product(q_GRtK, k_GsK.transpose(1, 2))
    score_GRts = score_GRts.to(torch.promote_types(q_GRtK.dtype, torch.float32)).mul_(q_GRtK.shape[-1] ** -0.5)
    if causal:
        t = score_GRts.shape[2]
        score_GRts += torch.full((t, t), float("-inf"), dtype=score_GRts.dtype).triu_(1)
    return score_GRts


class SegmentAttend(FastAttend):
    """FastAttend, by segments where the rows allow it."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        held = visible.__dict__.setdefault("segments", {})  # the same for every layer of this window
        if window not in held:
            held[window] = segments(visible, window) if q_BHTK.is_cpu else None
        if held[window] is None:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        return SegmentedAttention.apply(q_BHTK, k_BGSK, v_BGSK, held[window])
