"""The loss: cross entropy summed over the supervised tokens, divided by their number in the whole optimizer step.

Let t = 1…N be the targets of one step, spread over ranks g and micro-batches m. The loss is L = (1/N) Σ_t −log p_t.
Each micro-batch contributes L_gm = (1/N) Σ_{t in gm} −log p_t, so Σ_gm L_gm = L for any split, and likewise for the
gradients if ranks *sum* theirs. (A mean per micro-batch, or a mean over ranks, gives a token of a short micro-batch
more weight.) N is known before the first forward pass, because the step's rows are a function of (seed, step).

Only supervised tokens are multiplied by the output matrix, a chunk at a time. A chunk's logits, loss and gradient with
respect to the hidden states are computed together and its logits freed: memory is chunk × V, and no logits are
recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.support.hardware import product
from model.transformer import Transformer
from train.data.rows import ANSWER, IGNORE, NOTE, Batch

CHUNK = 512  # maximum number of tokens in a chunk
# Logits in a chunk (of 64 tokens or more): 17 MB in fp32. glibc maps requests over 32 MB anew: every page faults.
LOGITS = 2**22


def chunk(vocab_size: int) -> int:
    """Tokens in a chunk."""
    return max(64, min(CHUNK, LOGITS // vocab_size))


class ChunkedCrossEntropy(torch.autograd.Function):
    """(Σ_n scale_n · −log p_n, each −log p_n), p_n = softmax(x_n Wᵀ)[target_n], in at least fp32.

    Gradients are computed in the forward pass, while a chunk's logits exist; only the sum is differentiable.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale_N: Tensor):  # type: ignore[override]
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss_N = torch.empty(len(x_ND), dtype=wide, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        dw_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_w else None
        for start in range(0, len(x_ND), size := chunk(len(weight_VD))):
            part = slice(start, start + size)
            rows = torch.arange(len(target_N[part]), device=x_ND.device)
            logits_NV = product(x_ND[part], weight_VD).to(wide)
            target_logit_N, max_N1 = logits_NV[rows, target_N[part]], logits_NV.amax(dim=-1, keepdim=True)
            exp_NV = logits_NV.sub_(max_N1).exp_()  # in place
            sum_N1 = exp_NV.sum(dim=-1, keepdim=True)
            loss_N[part] = (sum_N1.log() + max_N1)[:, 0] - target_logit_N
            if needs_x or needs_w:
                # d loss / d logits = scale · (softmax − one-hot)
                grad_NV = exp_NV.mul_(scale_N[part, None] / sum_N1)
                grad_NV[rows, target_N[part]] -= scale_N[part]
                grad_NV = grad_NV.to(x_ND.dtype)
                if dx_ND is not None:
                    dx_ND[part] = product(grad_NV, weight_VD.t())
                if dw_VD is not None and wide == x_ND.dtype:
                    dw_VD.addmm_(grad_NV.t(), x_ND[part])
                elif dw_VD is not None:
                    dw_VD += grad_NV.t() @ x_ND[part]
        ctx.save_for_backward(dx_ND, None if dw_VD is None else dw_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(loss_N)
        return (loss_N * scale_N).sum(), loss_N

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor):  # type: ignore[override]
        dx_ND, dw_VD = ctx.saved_tensors
        return (
            None if dx_ND is None else dx_ND * upstream.to(dx_ND.dtype),
            None if dw_VD is None else dw_VD * upstream.to(dw_VD.dtype),
            None,
            None,
        )


def batch_loss(
    model: Transformer, batch: Batch, counts: dict[int, int], note_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(the micro-batch's share L_gm of the step's loss, Σ −log p over its answer tokens in fp64 without gradient).

    `counts` holds the number of targets of each kind in the whole step, over all ranks and micro-batches; the two kinds
    have a mean each, and the note's is weighted by `note_loss`. A batch without targets gives zero gradients, so that a
    rank without rows still takes part in the collectives.
    """
    index_N = (batch.target.flatten() != IGNORE).nonzero()[:, 0]
    target_N = batch.target.flatten()[index_N]
    is_answer_N = batch.kind.flatten()[index_N] == ANSWER

    def readout(x_BTD: Tensor, head: object) -> tuple[Tensor, Tensor]:
        x_ND = x_BTD.flatten(0, 1)[index_N]
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        share = torch.tensor([1 / max(counts[ANSWER], 1), note_loss / max(counts[NOTE], 1)], dtype=wide)
        scale_N = torch.where(is_answer_N, *share.to(x_ND.device))
        weight_VD = model.lm_head.weight if model.lm_head is not None else model.model.embed_tokens.weight
        loss, loss_N = ChunkedCrossEntropy.apply(x_ND, weight_VD, target_N, scale_N)
        return loss, loss_N[is_answer_N].sum(dtype=torch.float64)

    # the last block may skip tokens without a target (train/fast/block.py)
    some = 0 < len(index_N) < batch.target.numel()
    layout = replace(batch.layout, wanted_N=index_N if some else None)
    return model(batch.tokens, positions=batch.positions, layout=layout, readout=readout)
