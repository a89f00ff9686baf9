"""How a user names a feature network and where its file is."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qsl

from data_pipeline.errors import UserError
from eval.features.effnetlite0 import EFFNETLITE0
from eval.features.external import InputConvention
from eval.features.inception import INCEPTION, SIDE, STATE_FILE, STATE_INCEPTION, TORCHSCRIPT_FILE
from eval.features.resize import ResizeMode, resize_name
from eval.named_file import is_sha256
from eval.protocol import FeatureIdentity


class NetworkKind(StrEnum):
    """The first word of a choice."""

    EFFNETLITE0 = "effnetlite0"
    INCEPTION = "inception"
    INCEPTION_STATE = "inception-state"
    TORCHSCRIPT = "torchscript"
    PYTHON = "python"


_MODES: Final = {
    NetworkKind.EFFNETLITE0: (ResizeMode.CLEAN,),
    NetworkKind.INCEPTION: (ResizeMode.CLEAN, ResizeMode.LEGACY_TENSORFLOW),
    NetworkKind.INCEPTION_STATE: tuple(ResizeMode),
    NetworkKind.TORCHSCRIPT: (ResizeMode.CLEAN,),
    NetworkKind.PYTHON: (ResizeMode.CLEAN,),
}
_INCEPTIONS: Final = {
    NetworkKind.INCEPTION: (INCEPTION, TORCHSCRIPT_FILE),
    NetworkKind.INCEPTION_STATE: (STATE_INCEPTION, STATE_FILE),
}
_SYNTAX: Final = (
    "effnetlite0, inception=PATH_OR_URL, inception-state=PATH_OR_URL, "
    "torchscript=PATH_OR_URL#sha256=HEX&dim=D or python=FILE.py:FUNCTION#sha256=HEX&dim=D"
)
_DEFAULT_CONVENTION: Final = InputConvention()
_OPTIONS: Final = ("dim", "classes", "side", "mean", "std", "name")


@dataclass(frozen=True)
class FeatureChoice:
    """Which network to use and where its file is.

    Attributes:
        identity: The network with the SHA-256 its file must have.
        kind: How it is loaded.
        location: Path or URL of its file; None for the embedded network.
        resize: How pictures come to its input size.
        convention: What a network that the user brings wants to be shown.
    """

    identity: FeatureIdentity
    kind: NetworkKind
    location: str | None = None
    resize: ResizeMode = ResizeMode.CLEAN
    convention: InputConvention = _DEFAULT_CONVENTION


def parse_choice(text: str, resize: ResizeMode = ResizeMode.CLEAN) -> FeatureChoice:
    """Read a feature network as users write it.

    | text | network |
    |---|---|
    | `effnetlite0` | the embedded EfficientNet-Lite0 |
    | `inception=PATH_OR_URL[#sha256=HEX]` | the TorchScript Inception; by default with the official hash |
    | `inception-state=PATH_OR_URL[#sha256=HEX]` | the state-dict Inception, likewise |
    | `torchscript=PATH_OR_URL#sha256=HEX&dim=D[&…]` | any TorchScript file, see `eval.features.external` |
    | `python=FILE.py:FUNCTION#sha256=HEX&dim=D[&…]` | what a function of a Python file returns |

    The last two take `&classes=K` (default 0: none), `&side=N` (224), `&mean=R,G,B&std=R,G,B` (default:
    pixels in 0..255 as they are) and `&name=NAME`, which metric names then bear.

    Args:
        text: The choice.
        resize: How pictures shall come to the network's input size.

    Raises:
        UserError: An unknown network, one without its file or hash, a malformed option, or a resize that the
        network
            does not know.
    """
    name, _, rest = text.partition("=")
    if name not in set(NetworkKind) or (name == NetworkKind.EFFNETLITE0 and rest):
        raise UserError(f"features: unknown network {text!r}; use {_SYNTAX}")
    kind = NetworkKind(name)
    if resize not in _MODES[kind]:
        fitting = [other for other in NetworkKind if resize in _MODES[other]]
        raise UserError(
            f"features: {kind} has no resize={resize}, only {' and '.join(_MODES[kind])}; "
            f"resize={resize} goes with {' or '.join(fitting)}"
        )
    if kind is NetworkKind.EFFNETLITE0:
        return FeatureChoice(EFFNETLITE0, kind)
    location, _, fragment = rest.partition("#sha256=")
    if kind in _INCEPTIONS:
        return _inception(kind, location, fragment, resize)
    return _external(kind, location, fragment)


def _inception(kind: NetworkKind, location: str, fragment: str, resize: ResizeMode) -> FeatureChoice:
    identity, file = _INCEPTIONS[kind]
    if not location:
        raise UserError(
            f"features: {kind} is never downloaded silently; give --features {kind}=PATH_OR_URL, "
            f"e.g. of {file.url} ({file.size} bytes, sha256 {file.sha256})"
        )
    sha256 = _sha256(fragment) if fragment else file.sha256
    changes = {"sha256": sha256, "resize": resize_name(resize, SIDE)}
    return FeatureChoice(identity.model_copy(update=changes), kind, location, resize)


def _external(kind: NetworkKind, location: str, fragment: str) -> FeatureChoice:
    sha256, _, query = fragment.partition("&")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not location or not sha256 or "dim" not in options:
        raise UserError(
            f"features: {kind} needs its file, its hash and its number of features; write "
            + next(form for form in re.split(", | or ", _SYNTAX) if form.startswith(kind))
        )
    unknown = ", ".join(sorted(set(options) - set(_OPTIONS)))
    if unknown:
        raise UserError(f"features: {kind} has no option {unknown}; known: {', '.join(_OPTIONS)}")
    function = None
    if kind is NetworkKind.PYTHON:
        location, _, function = location.rpartition(":")
        if not location.endswith(".py") or not function.isidentifier():
            raise UserError(
                "features: python wants FILE.py:FUNCTION#sha256=HEX&dim=D, as in dino.py:network#sha256=…"
            )
    name = options.get("name", kind.value)
    reserved = {NetworkKind.EFFNETLITE0, NetworkKind.INCEPTION, NetworkKind.INCEPTION_STATE}
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", name) or name in reserved:
        raise UserError(
            f"features: name={name}: use 1 to 32 letters, digits and ._-, and no name of another network"
        )
    convention = InputConvention(
        side=_number(options, "side", 224, least=1),
        mean=_triple(options, "mean"),
        std=_triple(options, "std"),
    )
    if (convention.mean is None) != (convention.std is None) or (convention.std and min(convention.std) <= 0):
        raise UserError("features: give mean and std together, std above 0, or neither")
    scaled = f"/mean={options['mean']}/std={options['std']}" if convention.mean else ""
    identity = FeatureIdentity(
        name=name,
        sha256=_sha256(sha256),
        dim=_number(options, "dim", 0, least=1),
        classes=_number(options, "classes", 0, least=0),
        resize=resize_name(ResizeMode.CLEAN, convention.side) + scaled,
        function=function,
    )
    return FeatureChoice(identity, kind, location, convention=convention)


def _sha256(text: str) -> str:
    sha256 = text.lower()
    if not is_sha256(sha256):
        raise UserError(f"features: #sha256={text} is not 64 hexadecimal digits")
    return sha256


def _number(options: dict[str, str], key: str, default: int, least: int) -> int:
    text = options.get(key, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UserError(f"features: {key}={text} is not a whole number of at least {least}")
    return int(text)


def _triple(options: dict[str, str], key: str) -> tuple[float, ...] | None:
    if key not in options:
        return None
    try:
        numbers = tuple(float(part) for part in options[key].split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise UserError(f"features: {key}={options[key]} is not three numbers, as in {key}=0.485,0.456,0.406")
    return numbers
