"""`python -m trainer supervise|worker`: what `launch/train.sh` starts."""

import typer

from trainer.command import report_errors, train, worker

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("supervise")(train)
app.command("worker")(worker)

if __name__ == "__main__":
    report_errors(app)
