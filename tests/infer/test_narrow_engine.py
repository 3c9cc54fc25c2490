"""Generation with quantised weights equals the plain model with the same weights."""

from answering_models import plain_greedy, tiny_model

from infer.generate import Generator
from model.narrow import narrow


def test_narrow_weights_generate(tokenizer):
    model = narrow(tiny_model())
    prompts = [[1, 2, 3], [1, 2, 3, *range(40)], [9]]
    for prompt, out in zip(prompts, Generator(model, tokenizer).generate(prompts, max_new_tokens=10), strict=True):
        assert out.tokens == plain_greedy(model, prompt, 10, tokenizer.stop_ids)[0]
