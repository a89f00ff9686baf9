"""Reference statistics that others published: `.npz` files of clean-fid, pytorch-fid, ADM and EDM.

A mean and a covariance say nothing of how they came about, and a distance to statistics of another resize is
no distance at all: so the user says whose file it is, which fixes network and resize, and names its SHA-256.

| kind | arrays | network and resize |
|---|---|---|
| `clean-fid` | mu, sigma | TorchScript Inception, `clean` |
| `clean-fid-legacy` | mu, sigma | TorchScript Inception, `legacy_tensorflow` |
| `pytorch-fid` | mu, sigma | state-dict Inception, `legacy_pytorch` |
| `adm` | mu, sigma, and mu_s, sigma_s of spatial features | TensorFlow's Inception, as `legacy_tensorflow` |
| `edm` | mu, sigma | TorchScript Inception, `legacy_tensorflow` |

All of them divide the covariance by N - 1 (`numpy.cov`); none tells its N.
"""

import io
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qs

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from eval.moments import Moments
from eval.named_file import check_sha256, is_sha256, read_named
from eval.protocol import FeatureIdentity, ImportedFile


class StatisticsKind(StrEnum):
    """Whose file it is."""

    CLEAN_FID = "clean-fid"
    CLEAN_FID_LEGACY = "clean-fid-legacy"
    PYTORCH_FID = "pytorch-fid"
    ADM = "adm"
    EDM = "edm"


RESIZE: Final = {
    StatisticsKind.CLEAN_FID: "clean",
    StatisticsKind.CLEAN_FID_LEGACY: "legacy_tensorflow",
    StatisticsKind.PYTORCH_FID: "legacy_pytorch",
    StatisticsKind.ADM: "legacy_tensorflow",
    StatisticsKind.EDM: "legacy_tensorflow",
}
"""The resize behind each kind, by the recipe's names (`evaluation.<spec>.resize`)."""


@dataclass(frozen=True)
class FileChoice:
    """A file of statistics that the user named.

    Attributes:
        location: Path or fsspec URL.
        identity: Whose it is, and its hash.
    """

    location: str
    identity: ImportedFile


@dataclass(frozen=True)
class ImportedStatistics:
    """What such a file holds.

    Attributes:
        moments: Of the pooled features; its count is nominal, for the files do not tell it.
        spatial: Of the spatial features, if the file has them.
    """

    moments: Moments
    spatial: Moments | None


def parse_reference_file(text: str, resize: str) -> FileChoice:
    """Read `PATH_OR_URL#sha256=HEX&kind=KIND`, and compare its resize with the protocol's.

    Raises:
        UserError: No hash, an unknown kind, or another resize.
    """
    location, _, fragment = text.partition("#")
    given = {name: values[-1] for name, values in parse_qs(fragment).items()}
    sha256, kind = given.get("sha256", "").lower(), given.get("kind", "")
    if not is_sha256(sha256) or kind not in set(StatisticsKind):
        raise UserError(
            f"reference_file={text}: write PATH_OR_URL#sha256=HEX&kind=KIND with KIND one of "
            f"{', '.join(StatisticsKind)}; `ddpm eval reference FILE.npz` prints the hash"
        )
    wanted = RESIZE[StatisticsKind(kind)]
    if wanted != resize:
        raise UserError(
            f"reference_file={text}: statistics of {kind} were taken with resize={wanted}, the specification "
            f"has resize={resize}: distances between both mean nothing; set resize: {wanted}"
        )
    return FileChoice(location, ImportedFile(kind=kind, sha256=sha256))


def load_statistics(choice: FileChoice, features: FeatureIdentity) -> ImportedStatistics:
    """Read a file of statistics for a feature network.

    Raises:
        UserError: The file is missing, of another hash, or not of the network's dimension.
    """
    data = read_bytes(choice.location)
    remedy = "fetch the file anew or correct reference_file"
    check_sha256(data, choice.location, choice.identity.sha256, remedy)
    arrays = read_arrays(data, choice.location)
    dim = len(arrays["mu"])
    if dim != features.dim:
        raise UserError(
            f"{choice.location}: statistics of {dim} features, {features.name} has {features.dim}; "
            "name the network that the file was made with"
        )
    spatial = None
    if features.spatial is not None and "mu_s" in arrays:
        if len(arrays["mu_s"]) != features.spatial:
            raise UserError(
                f"{choice.location}: statistics of {len(arrays['mu_s'])} spatial features, {features.name} "
                f"has {features.spatial}; name the network that the file was made with"
            )
        spatial = _moments(arrays["mu_s"], arrays["sigma_s"])
    return ImportedStatistics(_moments(arrays["mu"], arrays["sigma"]), spatial)


def read_bytes(location: str) -> bytes:
    """Read a file of statistics by path or URL.

    Raises:
        UserError: It cannot be read.
    """
    return read_named(location, "statistics", "check the path")


def read_arrays(data: bytes, where: str) -> dict[str, NDArray[np.float64]]:
    """Read mu and sigma, and mu_s and sigma_s if they are there, from an `.npz` file; nothing is unpickled.

    Raises:
        UserError: No such file, arrays missing or of the wrong shape, or numbers that are not finite.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            names = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in archive.files]
            arrays = {name: np.asarray(archive[name], dtype=np.float64) for name in names}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: no .npz file of statistics; it needs arrays mu and sigma") from error
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean == "mu_s" and mean not in arrays and covariance not in arrays:
            continue
        if mean not in arrays or covariance not in arrays:
            raise UserError(
                f"{where}: has no arrays {mean} and {covariance}; it holds no reference statistics"
            )
        dim = arrays[mean].size
        if arrays[mean].shape != (dim,) or arrays[covariance].shape != (dim, dim):
            raise UserError(
                f"{where}: {mean} has shape {arrays[mean].shape}, {covariance} {arrays[covariance].shape}, "
                "expected [d] and [d, d]; it holds no reference statistics"
            )
        if not (np.isfinite(arrays[mean]).all() and np.isfinite(arrays[covariance]).all()):
            raise UserError(f"{where}: {mean} or {covariance} is not finite; the file is damaged")
    return arrays


def _moments(mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Moments:
    nominal = len(mean) + 2  # any will do: the covariance is the scatter over (count - 1)
    symmetric = (covariance + covariance.T) / 2  # float32 files are not symmetric to the last bit
    return Moments(nominal, torch.from_numpy(mean), torch.from_numpy(symmetric * (nominal - 1)))
