# %% [markdown]
# # One extraction, step by step
# A synthetic note → nine questions → prompts → prefix tree → constrained decoding → the note's record. The model is
# from a finished `make demo`; without one, weights are random and the answers wrong, but still of valid form.
# %%
import json
import tempfile
from os.path import commonprefix
from pathlib import Path

import torch

from infer import tasks
from infer.engine.generate import Generator, RequestBatch
from infer.engine.load import load
from infer.engine.tree import build_tree
from infer.extract.answers import phenotype_record
from infer.extract.ask import Asker, Limits
from infer.extract.grounded import Grammar
from infer.extract.notes import Note
from model import ModelConfig, Tokenizer, Transformer
from model.support.init import init_weights
from model.support.source import ROOT, check, show
from train.clinic.program import patient_notes
from train.data.tokenizer import Options, train_tokenizer

written = next(patient_notes("p", number=1, seed=0))
note = Note(written["id"], written["text"])
runs = sorted(Path("runs").glob("demo*/tuned/adapter"))
if runs:
    recipe = json.loads((runs[0].parent / "run.json").read_text())["recipe"]
    merged = [recipe["adapter"]] if recipe["merge_adapter"] else []
    model, tokenizer = load(recipe["weights"], [*merged, runs[0]], "float64", device="cpu")
else:
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        texts.write_text("".join(json.dumps(one) + "\n" for n in range(9) for one in patient_notes("p", n, 0)))
        tokenizer = Tokenizer.from_pretrained(train_tokenizer(Options((str(texts),), f"{folder}/tokenizer", 512)))
    config = ModelConfig.from_dict(json.loads((ROOT / "train/recipes/tiny.json").read_text()))
    model = init_weights(Transformer(config), 0).double().requires_grad_(False)
show(patient_notes, "write_note(", model=runs[0] if runs else "random weights", note=written["text"])

# %% [markdown]
# ## Questions, prompts, prefix tree
# Eight questions ask for phenotypes, one for the diagnosis. The note comes first in all nine prompts, so its prefill
# runs once: all branches attend to the prefix's keys and values.
# %%
generator = Generator(model, tokenizer)
asker = Asker(generator, "both", "template", Limits(diagnosis=100), grounded=True)
questions = asker.questions(note)
requests = asker.requests(asker.parts(note)[0], {})
prompts = [request.prompt for request in requests]
show(Asker.prompt, "tasks.prefix(text), bos=True", tokens_of_each_prompt=[len(prompt) for prompt in prompts])
prefix, branch = tokenizer.encode(tasks.prefix(note.text), bos=True), tokenizer.encode(tasks.branch(questions[0][1]))
check("tokens of the note + tokens of the first question", len(prefix) + len(branch), len(prompts[0]))
prefixes, branches = build_tree(prompts)
computed, whole = sum(len(part.tokens) for part in (*prefixes, *branches)), sum(map(len, prompts))
show(RequestBatch.add, "build_tree(", branches=len(branches), computed_tokens=f"{computed} instead of {whole}")
check("tokens of the longest common prefix", len(commonprefix(prompts)), len(prefixes[0].tokens))

# %% [markdown]
# ## Constrained decoding, and the record
# At every step only tokens that can continue a valid answer are allowed: here a span of the note. The answer's
# log-probability is that of the unconstrained model. The record has each value's character offsets in the note (start,
# end) and the code of the diagnosis.
# %%
outs = generator.generate(prompts, [request.settings for request in requests])
number = list(tasks.PHENOTYPES).index("tumor_site")
asked, out = requests[number], outs[number]
grammar = asked.settings.constraint.grammar
first = grammar.allowed(grammar.begin())
show(Grammar.allowed, "ids += below[0]", allowed_first=f"{len(first)} of {tokenizer.vocab_size}", answer=repr(out.text))
logits_TV = model(torch.tensor([asked.prompt + out.tokens]))[0, len(asked.prompt) - 1 :]
logprob_T = logits_TV.log_softmax(-1)[range(len(out.tokens)), out.tokens]
check("Σ log p of the answer's tokens, by the plain forward pass", float(logprob_T.sum()), sum(out.logprobs), 1e-9)
(record,) = asker.records([note])
show(phenotype_record, "start, end = ", diagnosis=record["diagnosis"]["codes"][:1])
for name, phenotype in tasks.PHENOTYPES.items():
    found = [(value["text"], value["start"], value["end"]) for value in record["phenotypes"][name]["answers"]]
    print(f"    {name}: {found}; true: {[one['text'] for one in written['phenotypes'][name]]}")
    for text, start, end in found:
        said_in_note = start is not None and note.text[start:end].split() == text.split()
        assert text in phenotype.values if phenotype.values else said_in_note, f"{name}: not an allowed answer"
