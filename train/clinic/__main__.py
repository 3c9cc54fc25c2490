"""`python -m train.clinic`."""

from model.support.cli import run
from train.clinic.program import Options, main

if __name__ == "__main__":
    run(main, Options)
