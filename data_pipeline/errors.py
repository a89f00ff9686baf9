"""The errors every room shares and the exit codes the commands answer with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `ddpm` command and launch script."""

    FINISHED = 0
    FAILED = 1
    USER_MISTAKE = 2
    REQUEUE = 75
    """Stopped early on request (signal, time limit); the same command resumes."""


class UserError(ValueError):
    """A mistake only the user can mend: one line naming file or key, what is wrong, and the remedy.

    The command line prints the message without a traceback and exits with `ExitCode.USER_MISTAKE`.
    """


class StorageFault(OSError):
    """A fault of the world that outlived every retry (storage down, bytes that stay corrupt)."""
