"""`ewavit` in which process 1 kills itself after its fifth optimizer step, at its first start."""

import os
import signal
import sys

import pytest

from ewavit.cli import main
from runs import stop_after

with pytest.MonkeyPatch.context() as patch:
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        stop_after(patch, 5, signal.SIGKILL)
    sys.exit(main())
