"""Instruction tuning: `python -m train.instruct RECIPE.toml [--key value …]`. Prints the adapter's folder."""

from train.session import program

if __name__ == "__main__":
    program("instruct")
