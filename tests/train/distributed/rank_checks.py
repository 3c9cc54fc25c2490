"""What test_ranks_load.py looks at, on any number of ranks: models placed, optimizers' steps, runs gone on from.

torchrun --nproc-per-node N tests/train/distributed/rank_checks.py OPTIONS.json OUT.safetensors
"""

import json
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_runs import as_recipe, in_step, sigterm

import model.checkpoints.safetensors as files
from model.checkpoints.weights import config_dict
from model.config import ModelConfig
from model.support.cli import UserError
from model.support.init import init_weights
from model.transformer import Transformer
from train import session
from train.distributed.checkpoint import gathered, steps_saved
from train.distributed.sharding import Ranks, rows_of, shard, sharded_like
from train.optim.optimizer import make_optimizers, named_trainable, state_tensors
from train.recipe import Recipe

# no dimension divides by 3; rows of 320 hold a block of 256 and a rest, and five blocks of NF4; keys have four rows
WIDE = ModelConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, None),
    max_position_embeddings=2048,
)


def placed(name: str, options: dict, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a loaded model, whole, and the bytes of tensors that each rank read for it."""
    recipe = as_recipe(options)
    config = ModelConfig.from_dict(config_dict(recipe.init or recipe.weights))
    read, fill = [0], files.fill

    def counted(path, file, tensor):
        read[0] += tensor.numel() * tensor.element_size() if "adapter" not in path.name else 0
        return fill(path, file, tensor)

    files.fill = counted
    try:
        model, _ = session.load_model(recipe, config, ranks, session.empty_model(recipe, config))
    finally:
        files.fill = fill
    everything = [*model.named_parameters(), *model.named_buffers()]
    found = {f"{name}/{key}": gathered(value.clone()) for key, value in everything}
    return found | {f"{name}/bytes": torch.tensor(ranks.gather(read[0]))}


def stepped(optimizer: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Weights and optimizer state after three steps on gradients that are the same on any number of ranks."""
    recipe = Recipe(data=("x",), out="x", weights="x", optimizer=optimizer, full=True, weight_decay=0.1)
    model = init_weights(Transformer(WIDE), 1).requires_grad_(True)
    if ranks.world > 1:
        shard(model, ranks)
    optimizers = make_optimizers(model, recipe)
    for step in range(3):
        for number, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            grad = torch.randn(param.shape, generator=generator)
            param.grad = sharded_like(grad[rows_of(param, len(grad))].clone(), param, param.shape)
        for each in optimizers:
            each.step()
    found = {f"{optimizer}/{name}": gathered(p) for name, p in named_trainable(model).items()}
    return found | {f"{optimizer}/{name}|{key}": gathered(v) for name, key, v in state_tensors(model, optimizers)}


def said(work) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def refusals(options: dict, ranks: Ranks) -> list[str]:
    """What each rank is told where one recipe differs, and where one rank alone meets a mistake."""
    other = options | {"learning_rate": 0.5} if ranks.rank == ranks.world - 1 else options
    differ = said(lambda: session.prepare(as_recipe(other), "instruct", ranks))
    assert not Path(options["out"]).exists(), "some work was done before ranks agreed"

    def missing():
        if ranks.rank == ranks.world - 1:
            raise UserError("no such file")

    return ranks.gather([differ, said(lambda: ranks.run_on_all(missing))])


def went_on(options: dict, ranks: Ranks) -> str:
    """Stop by a SIGTERM that the last rank alone gets, in the third step, then go on to the end; the stop's
    checkpoint."""
    trainer = session.prepare(as_recipe(options), "instruct", ranks)
    if ranks.rank == ranks.world - 1:
        in_step(trainer, 3, sigterm)
    try:
        trainer.run()
    except SystemExit as stop:
        assert stop.code == 0
    saved = steps_saved(Path(options["out"]) / "checkpoints")[-1].name
    trainer = session.prepare(as_recipe(options), "instruct", ranks)
    trainer.run()
    session.finish(trainer, 0.0)
    return saved


def main() -> None:
    torch.set_num_threads(1)
    cases, ranks = json.loads(Path(sys.argv[1]).read_text()), Ranks.join("cpu")
    out: dict[str, torch.Tensor] = {}
    told = {}
    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):
        for name, options in cases["placed"].items():
            out |= placed(name, options, ranks)
        for optimizer in ("adamw", "adamw8bit", "muon"):
            out |= stepped(optimizer, ranks)
        for options in cases["runs"]:
            trainer = session.prepare(as_recipe(options), "instruct", ranks)
            trainer.run()
        if ranks.world > 1:
            told["refusals"] = refusals(cases["stopped"], ranks)
            told["went on"] = [went_on(cases[name], ranks) for name in ("stopped", "narrow", "full")]
            for name in ("straight", "full straight"):
                session.prepare(as_recipe(cases[name]), "instruct", ranks).run()
    if ranks.first:
        save_file(out, sys.argv[2])
        Path(sys.argv[2]).with_suffix(".json").write_text(json.dumps(told))
    ranks.gather(None)  # the others wait for the first
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
