"""The worked examples of eval/README.md give the numbers that they show."""

import doctest
from pathlib import Path

from eval.metrics import statistics


def test_worked_examples_of_the_readme():
    readme = Path(statistics.__file__).parents[1] / "README.md"
    code = [block.split("```")[0] for block in readme.read_text(encoding="utf-8").split("```python\n")[1:]]
    assert len(code) == 8
    test = doctest.DocTestParser().get_doctest("\n".join(code), {}, "README", str(readme), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0 and runner.tries >= 16
