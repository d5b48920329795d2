"""Process rank from launcher environment variables; no torch import.

`torchrun` and `accelerate launch` set RANK (over all machines), LOCAL_RANK and LOCAL_WORLD_SIZE (on this machine).
"""

import os


def is_main_process() -> bool:
    """Whether this process writes, logs and shows progress."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Returns whether this process is the first on its machine, which prints errors."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def processes_here() -> int:
    """Returns the number of processes of the run on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1
