import json

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from eval import selftest
from launch.cli import app


def test_known_numbers_and_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one run: the formula's and the digits' distance are the known ones, the altered score is told."""
    known = selftest.DIGITS_SCORE
    monkeypatch.setattr(selftest, "DIGITS_SCORE", known + 0.1)
    done = CliRunner().invoke(app, ["eval", "selftest", "--json"], catch_exceptions=False)
    assert done.exit_code == 1
    found = selftest.SelfTest.from_json(done.stdout.encode(), "stdout")
    assert [check.ok for check in found.checks] == [True, True, False]
    assert found.checks[2].measured == pytest.approx(known, rel=1e-3)
    assert json.loads(done.stdout)["schema"] == "selftest/1"


def test_published_score_needs_its_files(data_url: str, inception_option: str) -> None:
    command = ["eval", "selftest", "--features", inception_option, "--cifar10", data_url]
    with pytest.raises(UserError, match="holds pictures of size 8 with 1"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    missing = ["eval", "selftest", "--features", "inception=nowhere.pt"]
    with pytest.raises(UserError, match=r"nowhere\.pt: .* 95607719 bytes"):
        CliRunner().invoke(app, missing, catch_exceptions=False)
