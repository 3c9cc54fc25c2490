"""The worked examples of docs/evaluation.md give the numbers that they show."""

import doctest
from pathlib import Path


def test_worked_examples_of_the_page():
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    code = [block.split("```")[0] for block in page.read_text(encoding="utf-8").split("```python\n")[1:]]
    test = doctest.DocTestParser().get_doctest("\n".join(code), {}, "evaluation.md", str(page), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0 and runner.tries == sum(block.count(">>> ") for block in code) > 0
