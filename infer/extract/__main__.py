"""`python -m infer.extract`."""

from infer.extract.program import Options, main
from model.support.cli import run

if __name__ == "__main__":
    run(main, Options)
