"""Child processes that cannot outlive their parent.

A child started through `tethered` is killed by the kernel when the thread that started it ends, for
whatever reason: a normal exit, an exception, even `kill -9`. Nothing has to run in the parent for that.
"""

import os
import signal
import sys
from collections.abc import Sequence

# Runs in the child between fork and exec, as a program of its own: `preexec_fn` is unsafe in a process
# with threads, and PR_SET_PDEATHSIG (1) survives exec. A parent that died before the call is no longer
# the parent by the time of the check.
_PROGRAM = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, int(sys.argv[1])) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[2]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[3], sys.argv[3:])
"""


def tethered(command: Sequence[str], death_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """Wrap a command line so that its process gets a signal when this one dies.

    The process id stays the command's own (the wrapper execs). The tether holds to the starting *thread*:
    start long-lived children from a thread that lives as long as they should. Children of the child are not
    tethered; give the child its own session and kill its group in the ordinary case.

    Args:
        command: The program and its arguments; the program is looked up on PATH.
        death_signal: What the kernel sends the child when its parent dies.

    Returns:
        The command line for `subprocess.Popen`, to be started by this process (not by a child of it).
    """
    return [sys.executable, "-I", "-S", "-c", _PROGRAM, str(int(death_signal)), str(os.getpid()), *command]
