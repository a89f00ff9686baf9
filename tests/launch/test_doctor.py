"""`ddpm doctor`: findings on this machine, and on machines that lack something."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ExitCode
from data_pipeline.storage import Storage
from launch import doctor
from launch.commands.doctor import app
from launch.doctor import Status
from trainer import extensions

KEYS = {"name", "status", "detail", "remedy"}


def test_healthy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extensions.prepare()
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)  # an earlier test may have imported it
    done = CliRunner().invoke(app, ["--store", str(tmp_path), "--json"], catch_exceptions=False)
    document = json.loads(done.output)
    assert document["schema"] == "doctor/1"
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert all(set(finding) == KEYS for finding in findings.values())
    for name in ("python", "torch", "devices", "deepspeed", "deepspeed operator", "features", "storage"):
        assert findings[name]["status"] == "ok", findings[name]
    assert findings["bf16"]["status"] in ("ok", "warn")  # right everywhere, slower on some CPUs
    assert "deepspeed" not in sys.modules  # tried in another process
    assert done.exit_code == any(finding["status"] == "fail" for finding in findings.values())
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_storage_on_s3(s3_prefix: str) -> None:
    finding = doctor.check_storage(s3_prefix)
    assert finding.status is Status.OK, finding
    assert Storage(s3_prefix).list() == []


def test_missing_bucket(s3_url: str) -> None:
    finding = doctor.check_storage(s3_url + "-misspelt")
    assert finding.status is Status.FAIL
    assert "bucket" in finding.detail
    assert finding.remedy


def test_unwritable_store_and_wrong_features_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_deepspeed", "check_bfloat16"):  # slow, and tested above
        monkeypatch.setattr(doctor, name, doctor.check_python)
    (tmp_path / "file").touch()
    arguments = ["--store", str(tmp_path / "file"), "--features", f"inception={tmp_path}/none"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == ExitCode.FAILED
    lines = done.output.splitlines()
    for name in ("features", "storage"):
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"fail  {name}: "))
        assert lines[number + 1].startswith("      -> ")


def test_broken_or_absent_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('no such op')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_deepspeed()
    assert finding.status is Status.FAIL
    assert "no such op" in finding.detail
    (tmp_path / "deepspeed.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.setattr(doctor, "_IMPORT_SECONDS", 0.3)
    finding = doctor.check_deepspeed()
    assert "takes more than" in finding.detail
    monkeypatch.setattr(importlib.metadata, "version", absent)
    finding = doctor.check_deepspeed()
    assert (finding.status, finding.remedy) == (Status.WARN, "pip install 'ddpm-foundry[train]'")


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor.check_compiler()
    assert finding.status is Status.WARN
    assert "c++" in finding.detail
    assert "g++" in finding.remedy


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((10, Status.OK), (2, Status.WARN), (0.5, Status.FAIL)):
        size = int(free * doctor.GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, size=size: shutil_usage(size))
        assert doctor.check_disk(tmp_path).status is status
    assert doctor.check_shared_memory(tmp_path / "none").status is Status.FAIL


def shutil_usage(free: int) -> object:
    return type("Usage", (), {"free": free})()


def test_help_needs_no_torch() -> None:
    program = "import sys, launch.commands.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
