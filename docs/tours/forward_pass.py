# %% [markdown]
# # A forward pass, step by step
# This tour follows the last token of a text from its id to the next token's probability, in a small Mistral with random
# weights. Every step prints the line of code, the values that it computed, and one number worked by hand. In fp64 both
# agree to twelve digits; the script stops if they do not. Names end in their shape: B batch, T query tokens, S keys, D
# model width, H query heads, G key/value heads, K head size, F feed-forward width, V vocabulary.
# %%
import json
import math

import torch

from infer import record
from model import KVCache, ModelConfig, Transformer
from model.attention import Attention, PlainAttend, Scores
from model.mask import Visible
from model.rotary import Rotate
from model.support.init import init_weights
from model.support.source import ROOT, check, show
from model.transformer import MLP, Block, Decoder, RMSNorm

config = ModelConfig.from_dict(json.loads((ROOT / "train/recipes/tiny.json").read_text()) | {"sliding_window": 24})
model = init_weights(Transformer(config), seed=0).double().requires_grad_(False)
block = model.model.layers[0]

# %% [markdown]
# ## Tokens, embedding, RMSNorm
# A tokenizer maps text to ids; here every byte is a token. An id selects a row of the embedding table: the first value
# of the residual stream, to which every layer adds. RMSNorm divides by the root mean square, so that what follows does
# not depend on the vector's length. `record` stores every intermediate value under its name.
# %%
text = "Left breast: invasive ductal carcinoma, 2.5 cm. ER+"
ids = list(text.encode())
with record(model, "*") as tape:
    logits_V = model(torch.tensor([ids]))[0, -1]
x_D = tape["embed"][0, -1]
show(Decoder.forward, "self.embed_tokens(tokens_BT)", ids=f"{len(ids)} tokens, the last {ids[-1]}", x_BTD=tape["embed"])
check("E[last id, 0]", float(model.model.embed_tokens.weight[ids[-1], 0]), x_D[0])
n_D = tape["layers.0.attn_norm.out"][0, -1]
mean = math.fsum(x * x for x in x_D.tolist()) / len(x_D)
show(RMSNorm.scale, "rsqrt", mean_square=mean, eps=config.rms_norm_eps, n_D=n_D)
check("x[0] / √(mean + eps)", float(x_D[0]) / math.sqrt(mean + config.rms_norm_eps), n_D[0])

# %% [markdown]
# ## Queries, keys, values
# Three projections. A token's query is compared with the keys of all tokens that it sees, and it receives their values.
# %%
q_K = tape["layers.0.attn.q"][0, 0, -1]
show(Attention.forward, "self.rotate_q(split_heads", Wq=block.self_attn.q_proj.weight, q_K=q_K)
check("Σ n_D · Wq[0]", float(n_D @ block.self_attn.q_proj.weight[0]), q_K[0])

# %% [markdown]
# ## Rotary positions
# Each pair of channels (n, n + K/2) of queries and keys is rotated by the angle position · θ^(−2n/K), so the dot
# product of a query and a key depends on their distance only, not on their positions. Here pair 1 of head 0.
# %%
rotated_K, K, last = tape["layers.0.attn.q_rot"][0, 0, -1], config.head_dim, len(ids) - 1
angle = last * config.rope_theta ** (-2 / K)
show(Rotate.forward, "torch.cat((-second", before=q_K, after=rotated_K)
by_hand = float(q_K[1]) * math.cos(angle) - float(q_K[1 + K // 2]) * math.sin(angle)
check(f"q[1] cos {angle:.4f} − q[1 + K/2] sin {angle:.4f}", by_hand, rotated_K[1])

# %% [markdown]
# ## Mask, scores, softmax, values
# A query at position i sees the keys i − W < j ≤ i. A score is the dot product of query and key divided by √K; softmax
# turns scores into weights, and the head's output is the weighted sum of values. H query heads share G key/value heads.
# %%
pattern_S = tape["layers.0.attn.pattern"][0, 0, -1]
seen = range(max(0, last - config.window + 1), last + 1)
show(Visible.block, "distance_BTS < window", window=config.window, text_seen=repr(text[seen.start :]))
check("min(tokens, W)", min(len(ids), config.window), (pattern_S > 0).sum())
k_SK, v_SK, z_BHTK = (tape[f"layers.0.attn.{name}"] for name in ("k_rot", "v", "z"))
weights = [math.exp(float(rotated_K @ k_SK[0, 0, j]) / math.sqrt(K)) for j in seen]
show(Scores.forward, "torch.matmul(q_BHTK", pattern_S=pattern_S[seen.start :])
check("the token's own weight, e^score / Σ e^score", weights[-1] / math.fsum(weights), pattern_S[-1])
show(PlainAttend.forward, "torch.matmul(pattern_BHTS", z_BHTK=z_BHTK)
check("Σ weight · v[:, 0]", math.fsum(float(pattern_S[j] * v_SK[0, 0, j, 0]) for j in seen), z_BHTK[0, 0, -1, 0])

# %% [markdown]
# ## Output projection and feed-forward
# o_proj combines the heads, and the result is added to the stream. After a second norm come silu(gate) · up, with F
# values each, and the projection down to D. Most of a model's weights are in the feed-forward layers.
# %%
middle_D = tape["layers.0.resid_mid"][0, -1]
show(Block.forward, "self.self_attn(", before=x_D, after=middle_D)
check("x[0] + Σ z · Wo", float(x_D[0] + z_BHTK[0, :, -1].flatten() @ block.self_attn.o_proj.weight[0]), middle_D[0])
gate, up, hidden = (float(tape[f"layers.0.mlp.{name}"][0, -1, 0]) for name in ("gate", "up", "hidden"))
show(MLP.forward, "self.down_proj(", hidden_BTF=tape["layers.0.mlp.hidden"], out_BTD=tape["layers.0.mlp.out"])
check("gate / (1 + e^−gate) · up", gate / (1 + math.exp(-gate)) * up, hidden)

# %% [markdown]
# ## The next token, with and without a KV cache
# The other layers do the same. A last norm and the head, with one row of weights per vocabulary entry, give the logits.
# Keys and values of past tokens do not change, so a cache stores them, and a decoding step computes one token only.
# %%
best = int(logits_V.argmax())
show(Transformer.head, "out = ", logits_V=logits_V, best=f"token {best}, {float(logits_V.softmax(-1)[best]):.2%}")
check(f"Σ n_D · W[{best}]", float(tape["final_norm.out"][0, -1] @ model.lm_head.weight[best]), logits_V[best])
cache = KVCache(config)
model(torch.tensor([ids[:-1]]), cache=cache)
show(Attention.forward, "cache.append(", size=f"{cache.bytes():,} bytes")
check("the same logit from the cache", float(model(torch.tensor([ids[-1:]]), cache=cache)[0, -1, best]), logits_V[best])
