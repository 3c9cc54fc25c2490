"""8-bit AdamW is AdamW to within its state's rounding, exactly AdamW for small tensors, and a quarter of its memory."""

import torch

from train.optim.adamw8bit import AdamW8bit


def walk(optimizer, param, steps=30):
    target = torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (param - target).square().mean().backward()
        optimizer.step()
    return param.detach()


def test_against_adamw():
    for shape, exact in (((30, 40), True), ((100, 200), False)):
        params = [torch.zeros(shape, requires_grad=True) for _ in range(2)]
        ours = AdamW8bit([{"params": [params[0]], "weight_decay": 0.1}], lr=1e-2)
        theirs = torch.optim.AdamW([{"params": [params[1]], "weight_decay": 0.1}], lr=1e-2)
        a, b = walk(ours, params[0]), walk(theirs, params[1])
        assert b.abs().mean() > 0.1
        wrong = float((a - b).norm() / b.norm())
        assert wrong < 1e-6 if exact else 1e-6 < wrong < 0.05
        held = sum(t.numel() * t.element_size() for t in ours.state[params[0]].values())
        assert exact or held < 0.27 * 2 * 4 * params[0].numel()
