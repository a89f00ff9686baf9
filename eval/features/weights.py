"""Weight files: read from a path or URL that the user named, refused unless of the expected hash."""

from dataclasses import dataclass

from eval.named_file import check_sha256, read_named


@dataclass(frozen=True)
class PublishedFile:
    """A weight file that has a place in the world.

    Attributes:
        title: What it holds, for messages.
        url: Where it is published.
        size: Its length in bytes.
        sha256: Its hash.
    """

    title: str
    url: str
    size: int
    sha256: str

    def __str__(self) -> str:
        """Place, size and hash."""
        return f"{self.url}, {self.size} bytes, sha256 {self.sha256}"


def read_weights(location: str, sha256: str, published: PublishedFile | None = None) -> bytes:
    """Read a weight file.

    Args:
        location: Path or fsspec URL.
        sha256: The hash it must have.
        published: The file usually meant, for messages; None if there is none.

    Raises:
        UserError: The file cannot be read or has another hash; the line says which file is wanted.
    """
    title = published.title if published else "weights"
    wanted = f"the official file is {published}" if published else f"wanted is the file of sha256 {sha256}"
    data = read_named(location, title, wanted)
    check_sha256(data, location, sha256, f"{wanted}; to use another file on purpose append #sha256=HEX")
    return data
