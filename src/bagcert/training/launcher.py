"""Which of a run's processes this is, as the launcher said; known before any of them meet, and without torch.

`torchrun` and `accelerate launch` say it in RANK (over all machines), LOCAL_RANK and LOCAL_WORLD_SIZE (on this one).
"""

import os


def is_main_process() -> bool:
    """Whether this process writes, logs and shows progress."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process is the first on its machine, which says what went wrong."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def processes_here() -> int:
    """How many processes of the run share this machine and its memory."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1
