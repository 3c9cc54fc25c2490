"""(Continued) pre-training: `python -m train.pretrain RECIPE.toml [--key value …]`. Prints the adapter's folder."""

from train.session import program

if __name__ == "__main__":
    program("pretrain")
