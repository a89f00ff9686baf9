import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from launch.cli import app


def test_this_installation() -> None:
    done = CliRunner().invoke(app, ["eval", "selftest"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("ok ") == 3


def test_another_number_is_shown_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.selftest.DIGITS_SCORE", 1.2)
    done = CliRunner().invoke(app, ["eval", "selftest", "--json"], catch_exceptions=False)
    assert done.exit_code == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["CS-effnetlite0"]["expected"] == 1.2
    assert checks["CS-effnetlite0"]["measured"] == pytest.approx(1.164, abs=0.01)


def test_published_score_with_stand_ins(data_url: str, inception_option: str) -> None:
    """With random weights the published score is missed; pictures of another shape are refused."""
    command = ["eval", "selftest", "--features", inception_option, "--cifar10", data_url]
    with pytest.raises(UserError, match="holds pictures of size 8 with 1"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    missing = ["eval", "selftest", "--features", "inception=" + str(Path("nowhere.pt"))]
    with pytest.raises(UserError, match=r"nowhere\.pt: .* 95607719 bytes"):
        CliRunner().invoke(app, missing, catch_exceptions=False)
