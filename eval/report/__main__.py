"""`python -m eval.report`."""

from eval.report.build import Options, main
from model.support.cli import run

if __name__ == "__main__":
    run(main, Options)
