import io
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.tar_members import capacity, ending, header, padding

names = st.text("abcXYZ019_-.", min_size=1, max_size=100)


@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_tarfiles(members: list[tuple[str, bytes]]) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    ours = b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in members)
    assert ours + ending(len(ours)) == written.getvalue()


@given(st.integers(10_240, 200_000), st.integers(0, 200_000))
def test_capacity_is_what_fits(limit: int, members: int) -> None:
    assert (members <= capacity(limit)) == (members + len(ending(members)) <= limit)


@given(st.integers(0, 8 * 1024**3 - 1))
def test_any_size(size: int) -> None:
    info = tarfile.TarInfo("key.jpg")
    info.size, info.mode = size, 0o644
    assert header("key.jpg", size) == info.tobuf(tarfile.USTAR_FORMAT)
