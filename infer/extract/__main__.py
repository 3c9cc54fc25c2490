"""`python -m infer.extract`."""

import sys

from infer.extract.program import Options, main
from model.support.cli import run

if __name__ == "__main__":
    code: object = 0
    try:
        run(main, Options)
    except SystemExit as exit_:
        code = exit_.code
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)  # type: ignore[arg-type]
