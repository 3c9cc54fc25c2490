# %% [markdown]
# # One adapter, step by step
# y = x Wᵀ + s · (x Aᵀ) Bᵀ: a linear layer's weight W is frozen, and two thin matrices A and B are trained. One number
# per step is worked by hand in fp64. D: width of the input, O: of the output, R: the rank.
# %%
import json
import tempfile

import torch
import torch.nn.functional as F

from lora.adapter import LoRAConfig, adapted, add_lora, no_adapter
from lora.fold import merge_lora, merged_weight, unmerge_lora
from lora.layer import LoRALinear, init_a
from lora.peft import AdapterFile, load_adapter, save_adapter
from model import ModelConfig, Transformer
from model.support.init import init_weights
from model.support.source import ROOT, check, show

config = ModelConfig.from_dict(json.loads((ROOT / "train/recipes/tiny.json").read_text()))
R, alpha, module = 8, 16.0, "model.layers.0.self_attn.q_proj"
model = init_weights(Transformer(config), 0).double()
add_lora(model, LoRAConfig(R, alpha, target_modules=(module,)), seed=0)
layer = adapted(model)[module].double()
weight_OD, a_RD, b_OR = layer.weight, layer.lora_A["default"], layer.lora_B["default"]
tokens_1T = torch.tensor([list(b"Left breast: invasive ductal carcinoma, 2.5 cm. ER+")])

# %% [markdown]
# ## Initialization
# A and B have far fewer parameters than W, and only they have gradients and optimizer state. B is zero, so a new
# adapter leaves the logits bit-identical. A is uniform in ±1/√D: if both were zero, both gradients would be zero.
# %%
with torch.no_grad(), no_adapter(model):
    base_1TV = model(tokens_1T)
show(init_a, "uniform_", W=weight_OD, A=a_RD, B=b_OR, trained=a_RD.numel() + b_OR.numel(), frozen=weight_OD.numel())
check("s = α / R", alpha / R, layer.scale["default"])
check("logits that a new adapter changes", 0, (model(tokens_1T) != base_1TV).sum())

# %% [markdown]
# ## The first step
# A's gradient has the factor B, which is zero, so the first step changes only B. From the second step A trains too.
# %%
loss = F.cross_entropy(model(tokens_1T)[0, :-1], tokens_1T[0, 1:])
grad_a, grad_b = torch.autograd.grad(loss, [a_RD, b_OR])
b_OR.data -= 0.05 * a_RD.data.norm() / grad_b.norm() * grad_b
second = torch.autograd.grad(F.cross_entropy(model(tokens_1T)[0, :-1], tokens_1T[0, 1:]), a_RD)[0]
show(LoRALinear.forward, "y_NO.addmm_", first_gradient_of_B=grad_b, second_gradient_of_A=second)
check("largest magnitude in A's first gradient", 0, grad_a.abs().max())
assert second.abs().max() > 0

# %% [markdown]
# ## One token through the layer, unmerged and merged
# Unmerged, B A is never computed: x Aᵀ has R numbers per token, and Bᵀ maps them to O. A merged layer costs no more
# than a plain one. The original weight is kept, because subtracting the update would not restore it exactly.
# %%
x_D = torch.randn(layer.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
low_R, y_O = (a_RD @ x_D).detach(), layer(x_D[None])[0].detach()
show(LoRALinear.forward, "low_NR = ", low_R=low_R, y_O=y_O)
check("x · W[0] + s Σ (x Aᵀ) · B[0]", float(x_D @ weight_OD[0] + alpha / R * low_R @ b_OR.data[0]), y_O[0])
original_OD, update_OD = weight_OD.detach().clone(), alpha / R * (b_OR @ a_RD).detach()
merge_lora(model)
show(merged_weight, "+ delta).to(", differ_if_subtracted=int(((layer.weight - update_OD) != original_OD).sum()))
check("W[0, 0] + s (B A)[0, 0]", float(original_OD[0, 0] + update_OD[0, 0]), layer.weight[0, 0])
unmerge_lora(model)
check("weights that differ after unmerging", 0, (layer.weight != original_OD).sum())

# %% [markdown]
# ## On disk
# PEFT's two files; keys are `base_model.model.`, the module's name and `lora_A.weight` or `lora_B.weight`.
# %%
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, folder)
    show(save_adapter, "write_adapter", **AdapterFile(folder))
    again = load_adapter(init_weights(Transformer(config), 0).double(), folder)
check("logits that differ after saving and loading", 0, (again(tokens_1T) != model(tokens_1T)).sum())
