"""Command-line options of the benchmarks that train in processes of their own."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def add_training_options(parser: argparse.ArgumentParser, *, about_folder: str) -> None:
    """Add --threads, --small, --folder and --json.

    Args:
        parser: Of the benchmark.
        about_folder: Help of --folder.
    """
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of torch (default: its own choice); ranks share them",
    )
    parser.add_argument("--small", action="store_true", help="a small network, about which no bar is")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help=about_folder
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples here")


def read_training_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, counts: Sequence[str]
) -> dict[str, Any]:
    """Read the command line; a mistake ends the process as argparse does.

    Args:
        parser: Of the benchmark.
        arguments: The command line; None: the process's.
        counts: Names of the options that must be at least 1; `threads` is one of them anyhow.

    Returns:
        The options by name, `threads` never None.
    """
    found = vars(parser.parse_args(arguments))
    if min(*(found[name] for name in counts), found["threads"] or 1) < 1:
        parser.error("every N must be at least 1")
    if not found["folder"].is_dir():
        parser.error(f"{found['folder']}: no such folder")
    return found | {"threads": found["threads"] or torch.get_num_threads()}
