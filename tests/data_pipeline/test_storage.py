"""Storage: the same promises on a local folder, in memory and on a real S3 server."""

import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.storage import Storage


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "store"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/store")
    return Storage(request.getfixturevalue("s3_prefix"))


def test_what_is_written_is_read(store: Storage, tmp_path: Path) -> None:
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 2, 5) == b"234"
    assert store.size("a/b.bin") == 10
    assert store.child("a").read("b.bin") == b"0123456789"
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    store.upload("a/big", tmp_path / "file")
    assert store.size("a/big") == 100_000
    assert store.list("a") == ["b.bin", "big"]
    assert store.list() == ["a"]
    store.delete("a/big")
    store.delete("a/big")
    assert store.list("a") == ["b.bin"]


def test_absent_things(store: Storage) -> None:
    assert store.list("nothing") == []
    assert not store.exists("nothing")
    for ask in (store.read, store.size):
        with pytest.raises(FileNotFoundError):
            ask("nothing")


def test_create_only(store: Storage) -> None:
    store.prove_create_only()
    assert store.create("manifest.json", b"mine")
    assert store.create("manifest.json", b"mine"), "a lost answer must not look like a lost race"
    assert not store.create("manifest.json", b"theirs")
    assert store.read("manifest.json") == b"mine"
    assert store.list() == ["manifest.json"], "the probe must be cleaned up"


def test_of_many_creators_one_wins(store: Storage) -> None:
    start = threading.Barrier(8)
    won: list[int] = []

    def race(number: int) -> None:
        start.wait()
        if store.create("claim", f"{number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("claim") == f"{won[0]}".encode()


class _Flaky:
    """A real backend whose answers are cut short or lost a few times."""

    def __init__(self, inner: object, faults: list[OSError]) -> None:
        self._inner, self.faults, self.raised = inner, faults, 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        method: Callable[..., object] = getattr(self._inner, name)

        def call(*args: object) -> object:
            answer = method(*args)
            if self.faults:
                self.raised += 1
                raise self.faults.pop()
            return answer

        return call


def test_faults_are_retried_and_counted(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    flaky = _Flaky(store._backend, [ConnectionResetError("reset"), OSError(5, "EIO")])
    store._backend = flaky  # type: ignore[assignment]
    assert store.create("x", b"1"), "both answers were lost: of the writing and of the reading back"
    assert store.read("x") == b"1"
    assert flaky.raised == 2
    assert store.retries == 2


def test_a_lasting_fault_ends_in_storage_fault(tmp_path: Path) -> None:
    store = Storage(str(tmp_path), give_up_after=0.5)
    store.write("x", b"1")
    flaky = _Flaky(store._backend, [ConnectionResetError("reset") for _ in range(1000)])
    store._backend = flaky  # type: ignore[assignment]
    with pytest.raises(StorageFault, match="still failing after retries"):
        store.read("x")
    assert flaky.raised > 1


def test_a_file_that_is_too_short_is_named_at_once(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    store.write("x", b"123")
    with pytest.raises(StorageFault, match="x: 3 bytes, too few to read up to byte 10"):
        store.read_range("x", 0, 10)


def test_wrong_credentials(s3_prefix: str) -> None:
    program = f"""
        from data_pipeline.errors import UserError
        from data_pipeline.storage import Storage
        for ask in (lambda s: s.read("x"), lambda s: s.create("x", b""), lambda s: s.list()):
            try:
                ask(Storage({s3_prefix!r}))
            except UserError as error:
                assert "access denied" in str(error), error
                assert "not-the-secret" not in str(error)
            else:
                raise SystemExit("no error")
    """
    wrong = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    _run(program, wrong)


def test_missing_bucket(s3_prefix: str) -> None:
    missing = Storage("s3://no-such-place-anywhere/x")
    with pytest.raises(UserError, match="the bucket does not exist"):
        missing.create("y", b"")
    with pytest.raises(UserError, match="the bucket does not exist"):
        missing.read("y")


def test_the_word_bucket_in_a_path_means_nothing(s3_prefix: str, tmp_path: Path) -> None:
    for url in (f"{s3_prefix}/bucket", str(tmp_path / "my-bucket")):
        store = Storage(url)
        assert not store.exists("index.json")
        assert store.create("index.json", b"1")


@pytest.mark.parametrize(
    "environment",
    [{"AWS_ENDPOINT_URL": "localhost:8333"}, {"AWS_PROFILE": "nobody", "AWS_ACCESS_KEY_ID": ""}],
)
def test_misconfigured_access_is_named_at_once(s3_prefix: str, environment: dict[str, str]) -> None:
    program = f"""
        from data_pipeline.errors import UserError
        from data_pipeline.storage import Storage
        store = Storage({s3_prefix!r})
        try:
            store.read("x")
        except UserError as error:
            assert "standard chain" in str(error), error
            assert store.retries == 0
        else:
            raise SystemExit("no error")
    """
    _run(program, environment)


def test_full_disk_is_the_users_business_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
        import resource, signal
        from data_pipeline.errors import UserError
        from data_pipeline.storage import Storage
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store = Storage({str(tmp_path)!r})
        try:
            store.create("x", bytes(100_000))
        except UserError as error:
            assert "no space left" in str(error), error
        else:
            raise SystemExit("no error")
    """
    _run(program, {})
    assert list(tmp_path.iterdir()) == []


def test_unusable_urls(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        Storage("")
    with pytest.raises(UserError, match="nosuch"):
        Storage("nosuch://x/y")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another place"):
        Storage(str(tmp_path / "file")).write("x", b"")


def _run(program: str, environment: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize("url", ["s3://", "s3:///", "memory://"])
def test_a_url_without_a_bucket_is_no_local_folder(url: str) -> None:
    with pytest.raises(UserError, match="names no bucket"):
        Storage(url)


def test_a_folder_that_cannot_be_made_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="refused"):
        Storage("/proc/nothing").write("file", b"")
