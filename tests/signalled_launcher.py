"""`ewavit` with workers by forkserver, in which process 1 ends torchrun by SIGTERM after its third step."""

import multiprocessing
import os
import signal
import sys

import pytest

from ewavit.cli import main
from runs import observe


def end_torchrun(run):
    if run.progress.update == 3:
        os.kill(os.getppid(), signal.SIGTERM)


if __name__ == "__main__":  # workers import this file
    multiprocessing.set_start_method("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            observe(patch, end_torchrun)
        status = main()
        print(f"process {os.environ['RANK']} ends with {status}")
        sys.exit(status)
