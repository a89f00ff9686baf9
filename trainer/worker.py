"""One rank of a training job: joins the process group, trains, and leaves it whatever happens."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data_pipeline.errors import ExitCode, StorageFault, UserError
from trainer import extensions
from trainer.distributed import Environment, FollowedError, Ranks
from trainer.guards import DivergedError
from trainer.occupancy import occupied
from trainer.profiler import parse_profile
from trainer.recipe import load_recipe
from trainer.run import Run
from trainer.stop import CONTROL_VARIABLE, SUPERVISOR_VARIABLE, StopReason, StopRequest

log = logging.getLogger(__name__)


def main(
    recipe_name: str, overrides: Sequence[str], allowed: Sequence[str] = (), profile: str | None = None
) -> ExitCode:
    """Train as one rank of the job the environment describes.

    Args:
        recipe_name: A shipped recipe's name or a YAML file.
        overrides: `section.key=value` settings; `run=` and `data.url=` are needed unless the recipe has them.
        allowed: Keys of the recipe that may differ from those of the run so far.
        profile: Steps to profile, as `trainer.profiler.parse_profile` reads them.

    Returns:
        The exit code, also left for the supervisor of this node.
    """
    code = _guarded(recipe_name, overrides, tuple(allowed), profile)
    control = os.environ.get(CONTROL_VARIABLE)
    if control:
        # The launcher's own exit code cannot be trusted: it is 0 if the launcher was killed.
        Path(control, f"outcome-{os.environ.get('LOCAL_RANK', '0')}").write_text(str(int(code)))
    return code


def _guarded(
    recipe_name: str, overrides: Sequence[str], allowed: tuple[str, ...], profile: str | None
) -> ExitCode:
    try:
        environment = Environment.from_launcher()
        stop = StopRequest()
        _set_up_logging(environment)
        recipe = load_recipe(recipe_name, overrides)
        run = Run(recipe.run)
        if environment.device.type == "cpu":
            extensions.prepare()
            os.environ.update(extensions.environment())
        # Imported late: DeepSpeed takes seconds and needs the variables above.
        from trainer.engine import init_process_group
        from trainer.loop import Options, train

        options = Options(allowed, parse_profile(profile) if profile else None)
        init_process_group(environment, recipe.deepspeed.timeout_seconds)
        try:
            ranks = Ranks(environment, timedelta(seconds=recipe.deepspeed.timeout_seconds))
            with contextlib.ExitStack() as held:
                if SUPERVISOR_VARIABLE not in os.environ:  # else the supervisor holds the run
                    ranks.on_main(lambda: held.enter_context(occupied(run)))
                reason = train(recipe, run, ranks, stop, options)
        finally:
            dist.destroy_process_group()
    except FollowedError as error:
        return error.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_MISTAKE
    except (StorageFault, DivergedError, extensions.BuildError) as error:
        log.error("%s", error)
        return ExitCode.FAILED
    return ExitCode.REQUEUE if reason is StopReason.REQUESTED else ExitCode.FINISHED


def _set_up_logging(environment: Environment) -> None:
    level = logging.INFO if environment.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"[rank {environment.rank}] %(message)s", stream=sys.stderr)
    for noisy in ("DeepSpeed", "botocore", "aiobotocore", "fsspec", "s3fs", "torch.utils.cpp_extension"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
