"""Samples as PNG files, for those who want to look at them or to give them to another tool."""

from pathlib import Path

from data_pipeline.errors import UserError
from eval.report.grid import to_pil
from eval.statistics import Pictures


class PicturesFolder:
    """Writes the chunks that a process draws as `NNNNNN.png`, numbered as the samples are.

    Processes of one evaluation write different files, so that on a shared disk the folder becomes complete.

    Args:
        folder: Where; made if it is not there.
        total: N; pictures past it, which pad the last chunk, are left out.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._folder, self._total = folder, total

    def __call__(self, first: int, pictures: Pictures) -> None:
        """Write a chunk whose first picture has this number.

        Raises:
            UserError: The folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(pictures.images[: max(0, self._total - first)], start=first):
                to_pil(image).save(self._folder / f"{number:06d}.png")
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{self._folder}: cannot write pictures ({reason}); choose another folder"
            ) from error
