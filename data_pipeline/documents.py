"""Versioned JSON documents: every file of ours carries `"schema": "name/major"`.

The pydantic models that subclass `Document` are the definition of the formats; `docs/format.md`
describes them. Within one major version keys may be added, so unknown keys are ignored on reading.
Of an older major version a document says how it becomes the next one; any other version is refused by name.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import UserError


def canonical_json(value: Any) -> bytes:
    """Serialise JSON data so that equal data gives equal bytes (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes a document's content, `schema` included, that of the next major version."""


class Document(BaseModel):
    """Base of every JSON file we write; a subclass names its format in `SCHEMA` ("name/major")."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    SCHEMA: ClassVar[str]
    MIGRATIONS: ClassVar[Mapping[str, Migration]] = {}
    """By older schema; they are applied one after the other. Files stay as they are."""

    def to_json(self) -> bytes:
        """Serialise with `schema` first, two-space indentation and a final newline (UTF-8)."""
        content = {"schema": self.SCHEMA, **self.model_dump(mode="json")}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse and validate one document.

        Args:
            data: The file's bytes.
            where: The file's name for error messages.

        Raises:
            UserError: Not JSON, another format or major version, or missing or ill-typed keys.
        """
        try:
            content = json.loads(data)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); the file is damaged or not ours") from error
        while isinstance(content, dict) and content.get("schema") in cls.MIGRATIONS:
            content = cls.MIGRATIONS[content["schema"]](content)
        found = content.get("schema") if isinstance(content, dict) else None
        if found != cls.SCHEMA:
            raise UserError(
                f"{where}: schema is {found!r} but this version reads {cls.SCHEMA!r}; "
                "use the ddpm-foundry release that wrote the file"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{where}: {describe_first(error)}") from error


def describe_first(error: ValidationError) -> str:
    """Tell the first problem of a pydantic error in one line: `key.path: message`."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{key}: {first['msg']}"
