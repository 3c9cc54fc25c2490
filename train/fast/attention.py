"""Attention for training rows, document by document: little more is computed than pairs that see each other.

A row of train/data/rows.py holds documents; a document is a prefix and branches, each a run of tokens with running
positions. A mask over the whole row computes T² pairs, of which most are then masked out. Here (n prefix tokens,
branches of m) the row's queries are taken 128 at a time, each with all the keys that any of them sees, and
a mask:

    a piece of the prefix       on the prefix up to its end
    some whole branches         on the prefix and on these branches

A note of 400 tokens with eight questions of 40: 267,904 pairs in place of 518,400, of which 214,400 are needed;
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

QUERIES = 128  # queries at once, about: few enough that not many pairs are masked, enough for products to pay


@dataclass(frozen=True)
class Part:
    """Queries that are computed at once, and the keys that any of them sees. The last keys are the queries' own tokens:
    who sees whom there is in the bias, 0 or −∞, (t, t); the keys before them are seen by all."""

    queries: slice
    keys: tuple[slice, ...]
    bias_tt: Tensor

    def rows(self, bias_Nt: Tensor) -> slice:
        """Where the queries stand when each token has several rows, as many as the bias has."""
        ratio = len(bias_Nt) // len(self.bias_tt)
        return slice(self.queries.start * ratio, self.queries.stop * ratio)

    def gather(self, x_GTK: Tensor) -> Tensor:
        """The keys' rows, (G, s, K)."""
        return x_GTK[:, self.keys[0]] if len(self.keys) == 1 else torch.cat([x_GTK[:, keys] for keys in self.keys], 1)

    def add(self, sum_GTK: Tensor, part_GsK: Tensor) -> None:
        """Add to the keys' rows."""
        start = 0
        for keys in self.keys:
            stop = start + keys.stop - keys.start
            sum_GTK[:, keys] += part_GsK[:, start:stop]
            start = stop


Placed = tuple[int, Part, Tensor]  # (row, part, its bias for every query head of a group)


@dataclass(frozen=True)
class Document:
    """Where a document's prefix and each of its branches lie in a row."""

    row: int
    prefix: slice
    branches: tuple[slice, ...]

    def parts(self) -> list[Part]:
        """Every query of the document once."""
        made = []
        for start in range(self.prefix.start, self.prefix.stop, QUERIES):
            stop = min(start + QUERIES, self.prefix.stop)
            made.append(Part(slice(start, stop), (slice(self.prefix.start, stop),), causal(stop - start)))
        group: list[slice] = []
        for branch in self.branches:
            if group and branch.stop - group[0].start > QUERIES:
                made.append(self.beside(group))
                group = []
            group.append(branch)
        return [*made, self.beside(group)] if group else made

    def beside(self, group: list[slice]) -> Part:
        """Whole branches on the prefix and on themselves; they do not see each other."""
        own = slice(group[0].start, group[-1].stop)
        bias_tt = torch.full((own.stop - own.start,) * 2, float("-inf"))
        for branch in group:
            rows = slice(branch.start - own.start, branch.stop - own.start)
            bias_tt[rows, rows] = causal(branch.stop - branch.start)
        keys = (slice(self.prefix.start, own.stop),) if own.start == self.prefix.stop else (self.prefix, own)
        return Part(own, keys, bias_tt)


def causal(tokens: int) -> Tensor:
    """The bias of tokens on themselves and those before them."""
    return torch.full((tokens, tokens), float("-inf")).triu_(1)


def find_documents(visible: Visible, window: int | None) -> list[Document] | None:
    """The documents of these rows, or None where they are not runs of tokens in reach of each other."""
    if visible.layout is None or visible.offset or visible.layout is not visible.key_layout:
        return None
    rows = zip(
        *(x.tolist() for x in (visible.layout.document_BT, visible.layout.branch_BT, visible.position_BT)), strict=True
    )
    found: list[Document] = []
    for row, (document_T, branch_T, position_T) in enumerate(rows):
        runs = cut(document_T, branch_T, position_T)
        if runs is None or (window is not None and max(position_T) >= window):
            return None
        found += [Document(row, prefix, tuple(branches)) for prefix, branches in runs]
    return found


def cut(document_T: list[int], branch_T: list[int], position_T: list[int]) -> list[tuple[slice, list[slice]]] | None:
    """One row's (prefix, branches) by document; None where positions do not run on within prefix and branches."""
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
                return None  # a document in pieces, or a prefix behind its branches
            prefix = found[-1][0]
            if branch_T[start] and position_T[start] != (
                position_T[prefix.stop - 1] + 1 if prefix.stop > prefix.start else position_T[start]
            ):
                return None
        start = end
    return found


class DocumentAttention(torch.autograd.Function):
    """softmax(q kᵀ / √K) v over the parts; padding gets zeros. q (B, H, T, K), k and v (B, G, T, K).

    Scores and weights have q's dtype, as in the plain path; sums and softmax are formed in at least fp32. Queries are
    laid out token by token, a token's heads of one group below each other (N = H/G · T), so a part's are a view.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, found: list[Placed]) -> Tensor:
        q_BGNK, k_BGTK, v_BGTK = by_group(q_BHTK, k_BGTK.shape[1]), k_BGTK.contiguous(), v_BGTK.contiguous()
        out_BGNK = torch.zeros_like(q_BGNK)
        for row, part, bias_Nt in found:
            queries = part.rows(bias_Nt)
            weight_GNs = weights(q_BGNK[row, :, queries], part.gather(k_BGTK[row]), bias_Nt)
            out_BGNK[row, :, queries] = torch.bmm(weight_GNs, part.gather(v_BGTK[row]))
        ctx.found = found
        ctx.save_for_backward(q_BGNK, k_BGTK, v_BGTK)
        return by_head(out_BGNK, q_BHTK.shape[2])

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:  # type: ignore[override]
        q_BGNK, k_BGTK, v_BGTK = ctx.saved_tensors
        grad_BGNK = by_group(grad_BHTK, k_BGTK.shape[1])
        dq_BGNK, dk_BGTK, dv_BGTK = (torch.zeros_like(x) for x in (q_BGNK, k_BGTK, v_BGTK))
        for row, part, bias_Nt in ctx.found:
            queries = part.rows(bias_Nt)
            q_GNK, grad_GNK = q_BGNK[row, :, queries], grad_BGNK[row, :, queries]
            k_GsK = part.gather(k_BGTK[row])
            weight_GNs = weights(q_GNK, k_GsK, bias_Nt)
            part.add(dv_BGTK[row], torch.bmm(weight_GNs.transpose(1, 2), grad_GNK))
            d_weight_GNs = torch.bmm(grad_GNK, part.gather(v_BGTK[row]).transpose(1, 2))
            d_score_GNs = torch._softmax_backward_data(d_weight_GNs, weight_GNs, -1, weight_GNs.dtype)
            dq_BGNK[row, :, queries] = torch.bmm(d_score_GNs, k_GsK)
            part.add(dk_BGTK[row], torch.bmm(d_score_GNs.transpose(1, 2), q_GNK))
        scale = q_BGNK.shape[-1] ** -0.5
        return by_head(dq_BGNK.mul_(scale), grad_BHTK.shape[2]), dk_BGTK.mul_(scale), dv_BGTK, None


def by_group(x_BHTK: Tensor, groups: int) -> Tensor:
    """(B, G, T · H/G, K) out of (B, H, T, K)."""
    B, H, T, K = x_BHTK.shape
    return x_BHTK.reshape(B, groups, H // groups, T, K).transpose(2, 3).reshape(B, groups, -1, K)


def by_head(x_BGNK: Tensor, tokens: int) -> Tensor:
    """(B, H, T, K) out of (B, G, T · H/G, K), a token's heads side by side in memory."""
    B, G, _, K = x_BGNK.shape
    return x_BGNK.view(B, G, tokens, -1, K).transpose(1, 2).reshape(B, tokens, -1, K).transpose(1, 2)


def weights(q_GNK: Tensor, k_GsK: Tensor, bias_Nt: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + bias), the bias on the last keys: (G, N, s)."""
    score_GNs = torch.baddbmm(q_GNK[:, :1, :1], q_GNK, k_GsK.transpose(1, 2), beta=0, alpha=q_GNK.shape[-1] ** -0.5)
    score_GNs[..., -bias_Nt.shape[1] :] += bias_Nt
    return torch.softmax(score_GNs, -1)


class DocumentAttend(FastAttend):
    """FastAttend, document by document where the rows allow it."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        held = visible.memo.setdefault("documents", {})  # the same for every layer of this window
        if window not in held:
            found = find_documents(visible, window) if q_BHTK.is_cpu else None
            held[window] = found and placed(found, q_BHTK.shape[1] // k_BGSK.shape[1], q_BHTK.dtype)
        if held[window] is None:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        return DocumentAttention.apply(q_BHTK, k_BGSK, v_BGSK, held[window])


def placed(found: list[Document], ratio: int, dtype: torch.dtype) -> list[Placed]:
    """Every part, with its bias for `ratio` query heads a key."""
    return [
        (one.row, part, part.bias_tt.repeat_interleave(ratio, 0).to(dtype)) for one in found for part in one.parts()
    ]
