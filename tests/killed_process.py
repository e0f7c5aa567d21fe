"""`ewavit` in which process 1 kills itself after its fifth optimizer step, at its first start."""

import os
import signal
import sys

from ewavit.cli import main
from ewavit.training import loop

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    original = loop._Run._update

    def update(run: loop._Run) -> None:
        original(run)
        if run.progress.update == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._Run._update = update

sys.exit(main())
