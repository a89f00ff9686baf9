"""Files that the user names, by path or URL and SHA-256: weights, statistics of others."""

import fsspec

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError


def is_sha256(text: str) -> bool:
    """Whether the text is 64 lower-case hexadecimal digits."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def read_named(location: str, what: str, remedy: str) -> bytes:
    """Read a file by path or fsspec URL.

    Args:
        location: Where it lies.
        what: What it holds, for the message.
        remedy: What to do if it cannot be read, likewise.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with fsspec.open(location, "rb") as stream:
            data: bytes = stream.read()
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{location}: cannot read {what} ({reason}); {remedy}") from error
    return data


def check_sha256(data: bytes, location: str, sha256: str, remedy: str) -> None:
    """Compare a file's content with the hash it must have.

    Raises:
        UserError: It is another.
    """
    found = sha256_hex(data)
    if found != sha256:
        raise UserError(f"{location}: {len(data)} bytes with sha256 {found}, expected {sha256}; {remedy}")
