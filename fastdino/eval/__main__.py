"""`python -m fastdino.eval NAME` and `torchrun --nproc-per-node N -m fastdino.eval NAME`: `fastdino-eval`."""

from fastdino.eval import main

if __name__ == "__main__":
    main()
