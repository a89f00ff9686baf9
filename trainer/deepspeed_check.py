"""DeepSpeed's own judgement of the keys that it was given raw."""

import contextlib
import io

import pydantic

from data_pipeline.documents import describe_first
from data_pipeline.errors import UserError
from trainer.deepspeed_config import build_config
from trainer.recipe import Recipe


def check_config(recipe: Recipe) -> None:
    """Let DeepSpeed judge what the user gave it, before anything is started.

    Raises:
        UserError: It refuses a key or value of `deepspeed.config`.
    """
    if not recipe.deepspeed.config:
        return
    # Late: DeepSpeed takes seconds to import, and logs to the stdout it finds then, which may be for JSON.
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.comm.config import CommsLoggerConfig
        from deepspeed.runtime.precision_config import DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = build_config(recipe, micro_steps=1, parameters=2, on_gpu=False)
    judges = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    for section, judge in judges.items():
        try:
            judge(**config.get(section, {}))
        except pydantic.ValidationError as error:
            raise UserError(
                f"deepspeed.config.{section}: {describe_first(error)}; see DeepSpeed's documentation"
            ) from error
