"""What kills leave of checkpoints that are being saved: ours and DeepSpeed's under one killer."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.checkpoint.crew import Crew
from benchmarks.checkpoint.saves import SIDES, Diary, run_of, theirs_of
from benchmarks.checkpoint.training import Job
from benchmarks.harness import OURS, Record
from benchmarks.process import AnsweringProcess
from trainer import checkpoint as checkpoints
from trainer.manifest import DamagedCheckpointError
from trainer.run import CheckpointGoneError, Run

RANKS: Final = 2
_SEED: Final = 0
_MOST_SKIPPED: Final = 3
"""Saves that go by before the one that is to be hit, at most."""


class Trial(Record):
    """One kill.

    Attributes:
        side: Who saved: one of `SIDES`.
        share: The moment that was drawn, as a share of a save's usual duration after its beginning.
        usual: That duration in seconds.
        hit: Whether a save had begun that had not ended on all ranks.
        torn: What is wrong with the newest checkpoint; None if nothing is.
    """

    side: str
    share: float
    usual: float
    hit: bool
    torn: str | None


Judge = Callable[[Path], str | None]
"""Tells what is wrong with the newest checkpoint in a trial's folder."""


def our_damage(folder: Path) -> str | None:
    """Tell what is wrong with our newest published checkpoint; all that it names is read."""
    run = Run(str(run_of(folder)))
    published = run.live_checkpoints()
    if not published:
        return "nothing is published any more"
    try:
        newest = checkpoints.newest_whole(run)
        if newest is None or newest.name != published[-1]:  # `newest_whole` passes over what is torn
            return f"{published[-1]} is published, but not whole"
        checkpoints.verify(run, newest)
    except (DamagedCheckpointError, CheckpointGoneError) as error:
        return str(error)
    return None


def measure_torn(kills: int, threads: int, place: Path) -> list[Trial]:
    """Kill each side so many times, in turns, at the same drawn moments.

    Args:
        kills: Of each side.
        threads: Of torch, of both ranks together.
        place: Folder for everything.

    Raises:
        ValueError: A checkpoint is found torn before anything was killed.
    """
    rng, found = random.Random(_SEED), []
    log = place / "judge.log"
    with AnsweringProcess(
        "benchmarks.checkpoint.judge", "judge", str(RANKS), {"DS_ACCELERATOR": "cpu"}, log
    ) as reader:

        def their_damage(folder: Path) -> str | None:
            answer: str | None = reader.ask("judge", folder=str(theirs_of(folder)))
            return answer

        for number in range(kills):
            share, skip = rng.random(), rng.randint(0, _MOST_SKIPPED)
            for side in SIDES:
                judge = our_damage if side == OURS else their_damage
                folder = place / f"{side}-{number}"
                found.append(_kill_one(side, judge, share, skip, threads, folder))
                shutil.rmtree(folder)
            print(f"killed {number + 1} of {kills} times each")
    return found


def _kill_one(side: str, judge: Judge, share: float, skip: int, threads: int, folder: Path) -> Trial:
    """Let two ranks save, kill them and look at what they leave."""
    folder.mkdir()
    with Crew(Job(small=True), RANKS, threads, folder) as crew:
        usual = max(crew.ask("save", side=side, folder=str(folder)))
        trouble = judge(folder)
        if trouble is not None:
            raise ValueError(f"{side}'s checkpoint is torn before anything is killed: {trouble}")
        crew.tell("go on", skip=skip)
        crew.processes[0].answer("go on")  # a save begins
        time.sleep(share * usual)
        crew.kill()
    hit = any(Diary(folder, rank).is_saving() for rank in range(RANKS))
    return Trial(side=side, share=share, usual=usual, hit=hit, torn=judge(folder))


def summary(trials: list[Trial]) -> str:
    """What became of all kills, in one line."""
    ours = [trial for trial in trials if trial.side == OURS]
    theirs = [trial for trial in trials if trial.side != OURS]
    return (
        f"torn: DeepSpeed {torn(theirs)} of {len(theirs)}, ours {torn(ours)} of {len(ours)} "
        f"({hits(theirs)} and {hits(ours)} of the kills fell into a save)"
    )


def torn(trials: list[Trial]) -> int:
    """How many kills left a torn checkpoint."""
    return sum(trial.torn is not None for trial in trials)


def hits(trials: list[Trial]) -> int:
    """How many kills fell into a save."""
    return sum(trial.hit for trial in trials)
