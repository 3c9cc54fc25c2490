"""Attention for training rows, document by document: little more is computed than the pairs that see each other.

A row of train/data/rows.py holds documents; a document is a prefix and its branches, each a run of tokens with
consecutive positions. A mask over the whole row computes T² pairs, most of which are masked out. Here a row's queries
are split into chunks of about 128; each chunk attends to the union of the keys that its queries see, with a mask:

    queries                     keys
    a chunk of the prefix       the prefix up to the chunk's end
    some whole branches         the prefix and these branches

For a note of 400 tokens and eight questions of 40 that is 267,904 pairs, of which 214,760 are visible, instead of
518,400. Smaller chunks would mask fewer pairs, but larger products are faster. All keys of a query are in one product,
so no softmax is split; the backward pass recomputes it, so only q, k and v are kept.

On a CPU, for rows whose documents fit the window; otherwise `FastAttend` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from model.fast_attention import FastAttend
from model.mask import Visible

QUERIES = 128  # queries in a chunk: a trade of masked pairs (large chunks) for speed of products (small ones)


@dataclass(frozen=True)
class Chunk:
    """Queries computed together, and the keys that any of them sees.

    The last t keys are the t queries' own tokens, masked by `bias_tt` (0 or −∞); all queries see the keys before them.
    """

    queries: slice
    keys: tuple[slice, ...]
    bias_tt: Tensor

    def rows(self, bias_Nt: Tensor) -> slice:
        """The queries' rows in a tensor with several rows a token, as many as `bias_Nt` has."""
        ratio = len(bias_Nt) // len(self.bias_tt)
        return slice(self.queries.start * ratio, self.queries.stop * ratio)

    def gather(self, x_GTK: Tensor) -> Tensor:
        """The rows of the keys, (G, s, K)."""
        return x_GTK[:, self.keys[0]] if len(self.keys) == 1 else torch.cat([x_GTK[:, keys] for keys in self.keys], 1)

    def scatter_add(self, sum_GTK: Tensor, part_GsK: Tensor) -> None:
        """Add `part_GsK` to the rows of the keys."""
        start = 0
        for keys in self.keys:
            stop = start + keys.stop - keys.start
            sum_GTK[:, keys] += part_GsK[:, start:stop]
            start = stop


RowChunk = tuple[int, Chunk, Tensor]  # (row of the batch, chunk, its bias repeated for the query heads of a group)


@dataclass(frozen=True)
class Document:
    """The tokens of a document's prefix and of each of its branches in a row."""

    row: int
    prefix: slice
    branches: tuple[slice, ...]

    def chunks(self) -> list[Chunk]:
        """Chunks that hold each query of the document once."""
        made = []
        for start in range(self.prefix.start, self.prefix.stop, QUERIES):
            stop = min(start + QUERIES, self.prefix.stop)
            made.append(Chunk(slice(start, stop), (slice(self.prefix.start, stop),), causal(stop - start)))
        group: list[slice] = []
        for branch in self.branches:
            if group and branch.stop - group[0].start > QUERIES:
                made.append(self.branch_chunk(group))
                group = []
            group.append(branch)
        return [*made, self.branch_chunk(group)] if group else made

    def branch_chunk(self, group: list[slice]) -> Chunk:
        """Whole branches, each of which sees the prefix and itself."""
        own = slice(group[0].start, group[-1].stop)
        bias_tt = torch.full((own.stop - own.start,) * 2, float("-inf"))
        for branch in group:
            rows = slice(branch.start - own.start, branch.stop - own.start)
            bias_tt[rows, rows] = causal(branch.stop - branch.start)
        keys = (slice(self.prefix.start, own.stop),) if own.start == self.prefix.stop else (self.prefix, own)
        return Chunk(own, keys, bias_tt)


def causal(tokens: int) -> Tensor:
    """A causal mask as a bias: 0 on and below the diagonal, −∞ above."""
    return torch.full((tokens, tokens), float("-inf")).triu_(1)


def find_documents(visible: Visible, window: int | None) -> list[Document] | None:
    """The documents of these rows; None if they are not runs of consecutive positions that fit the window."""
    if visible.layout is None or visible.offset or visible.layout is not visible.key_layout:
        return None
    rows = zip(
        *(x.tolist() for x in (visible.layout.document_BT, visible.layout.branch_BT, visible.position_BT)), strict=True
    )
    found: list[Document] = []
    for row, (document_T, branch_T, position_T) in enumerate(rows):
        runs = split_documents(document_T, branch_T, position_T)
        if runs is None or (window is not None and max(position_T) >= window):
            return None
        found += [Document(row, prefix, tuple(branches)) for prefix, branches in runs]
    return found


def split_documents(
    document_T: list[int], branch_T: list[int], position_T: list[int]
) -> list[tuple[slice, list[slice]]] | None:
    """(prefix, branches) of each document in a row; None if the positions of one are not consecutive."""
    found: list[tuple[slice, list[slice]]] = []
    seen: set[int] = set()
    stop = 0
    for (document, branch), tokens in groupby(zip(document_T, branch_T, strict=True)):
        start, stop = stop, stop + len(list(tokens))
        run, position = slice(start, stop), position_T[start]
        if document == -1:
            continue
        if position_T[run] != list(range(position, position + stop - start)):
            return None
        if document not in seen:
            seen.add(document)
            found.append((run, []) if branch == 0 else (slice(start, start), [run]))
        elif document == document_T[start - 1] and branch:
            found[-1][1].append(run)
        else:
            return None  # a document in several pieces, or a prefix after its branches
        prefix = found[-1][0]
        if branch and prefix.stop > prefix.start and position != position_T[prefix.stop - 1] + 1:
            return None
    return found


class DocumentAttention(torch.autograd.Function):
    """softmax(q kᵀ / √K) v over the chunks; padding gets zeros. q (B, H, T, K), k and v (B, G, T, K).

    Scores and weights have q's dtype, as in the plain path; sums and softmax are in at least fp32. Queries are ordered
    by token, then by head of the group (N = T · H/G rows), so that a chunk's queries are a view.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, chunks: list[RowChunk]) -> Tensor:
        q_BGNK, k_BGTK, v_BGTK = by_group(q_BHTK, k_BGTK.shape[1]), k_BGTK.contiguous(), v_BGTK.contiguous()
        out_BGNK = torch.zeros_like(q_BGNK)
        for row, chunk, bias_Nt in chunks:
            queries = chunk.rows(bias_Nt)
            weight_GNs = attention_weights(q_BGNK[row, :, queries], chunk.gather(k_BGTK[row]), bias_Nt)
            out_BGNK[row, :, queries] = torch.bmm(weight_GNs, chunk.gather(v_BGTK[row]))
        ctx.chunks = chunks
        ctx.save_for_backward(q_BGNK, k_BGTK, v_BGTK)
        return by_head(out_BGNK, q_BHTK.shape[2])

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:  # type: ignore[override]
        q_BGNK, k_BGTK, v_BGTK = ctx.saved_tensors
        grad_BGNK = by_group(grad_BHTK, k_BGTK.shape[1])
        dq_BGNK, dk_BGTK, dv_BGTK = (torch.zeros_like(x) for x in (q_BGNK, k_BGTK, v_BGTK))
        for row, chunk, bias_Nt in ctx.chunks:
            queries = chunk.rows(bias_Nt)
            q_GNK, grad_GNK = q_BGNK[row, :, queries], grad_BGNK[row, :, queries]
            k_GsK = chunk.gather(k_BGTK[row])
            weight_GNs = attention_weights(q_GNK, k_GsK, bias_Nt)
            chunk.scatter_add(dv_BGTK[row], torch.bmm(weight_GNs.transpose(1, 2), grad_GNK))
            d_weight_GNs = torch.bmm(grad_GNK, chunk.gather(v_BGTK[row]).transpose(1, 2))
            d_score_GNs = torch._softmax_backward_data(d_weight_GNs, weight_GNs, -1, weight_GNs.dtype)
            dq_BGNK[row, :, queries] = torch.bmm(d_score_GNs, k_GsK)
            chunk.scatter_add(dk_BGTK[row], torch.bmm(d_score_GNs.transpose(1, 2), q_GNK))
        scale = q_BGNK.shape[-1] ** -0.5
        return by_head(dq_BGNK.mul_(scale), grad_BHTK.shape[2]), dk_BGTK.mul_(scale), dv_BGTK, None


def by_group(x_BHTK: Tensor, groups: int) -> Tensor:
    """(B, H, T, K) → (B, G, T · H/G, K)."""
    B, H, T, K = x_BHTK.shape
    return x_BHTK.reshape(B, groups, H // groups, T, K).transpose(2, 3).reshape(B, groups, -1, K)


def by_head(x_BGNK: Tensor, tokens: int) -> Tensor:
    """(B, G, T · H/G, K) → (B, H, T, K), with a token's heads adjacent in memory."""
    B, G, _, K = x_BGNK.shape
    return x_BGNK.view(B, G, tokens, -1, K).transpose(1, 2).reshape(B, tokens, -1, K).transpose(1, 2)


def attention_weights(q_GNK: Tensor, k_GsK: Tensor, bias_Nt: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + bias), (G, N, s); the bias is added to the last t keys."""
    score_GNs = torch.baddbmm(q_GNK[:, :1, :1], q_GNK, k_GsK.transpose(1, 2), beta=0, alpha=q_GNK.shape[-1] ** -0.5)
    score_GNs[..., -bias_Nt.shape[1] :] += bias_Nt
    return torch.softmax(score_GNs, -1)


class DocumentAttend(FastAttend):
    """`DocumentAttention` on a CPU if the rows split into documents, else `FastAttend`."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        by_window = visible.memo.setdefault("documents", {})  # shared by the layers
        if window not in by_window:
            found = find_documents(visible, window) if q_BHTK.is_cpu else None
            by_window[window] = found and row_chunks(found, q_BHTK.shape[1] // k_BGSK.shape[1], q_BHTK.dtype)
        if by_window[window] is None:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        return DocumentAttention.apply(q_BHTK, k_BGSK, v_BGSK, by_window[window])


def row_chunks(documents: list[Document], ratio: int, dtype: torch.dtype) -> list[RowChunk]:
    """The chunks of all documents; `ratio` is query heads per key head."""
    return [
        (document.row, chunk, chunk.bias_tt.repeat_interleave(ratio, 0).to(dtype))
        for document in documents
        for chunk in document.chunks()
    ]
