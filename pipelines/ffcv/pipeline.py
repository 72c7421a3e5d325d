"""Pipeline of images in a .beton file, read by FFCV's compiled loops. B batch, N data set."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.common import optional
from engine.pipelines.prefetching import PrefetchingPipeline
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.sampling import Sampling

if TYPE_CHECKING:
    from engine.pipelines.ffcv.loader import BetonLoader


class FFCVPipeline(PrefetchingPipeline):
    """`PrefetchingPipeline` of images in a .beton file.

    In quasi-random order pages are read into a cache of FFCV's own shortly before they are needed; in other orders
    the system maps the file, which is faster where it fits into memory. Raw images that are copied as they are
    take one worker unless told otherwise: more would hold each other up.
    Raises ValueError too where FFCV is not installed or the images are in no .beton file.
    """

    def __init__(
        self, data: EncodedImages, sampling: Sampling, *, workers: int | None = None, **options: Any
    ) -> None:
        check_installed()
        if data.beton is None:
            raise ValueError(
                f"pipeline: ffcv reads .beton files and {data.tree.where()} is none; `engine data write` makes one"
            )
        self._source = beton.read(data.beton)
        self._position_N = np.array([beton.position(name) for name in data.names], np.int64)
        is_raw = (self._source.images["mode"][self._position_N] == beton.RAW).all()
        if workers is None and is_raw and not data.any_size:
            workers = 1
        super().__init__(data, sampling, workers=workers, **options)
        self._encoded = data

    @cached_property
    def _loader(self) -> BetonLoader:
        from engine.pipelines.ffcv.loader import BetonLoader

        return BetonLoader(
            self._source,
            self._data.shape,
            any_size=self._data.any_size,
            paged=self._sampling.order == "quasi-random",
            batch_size=self._sampling.images_per_rank,
            workers=self._workers,
            batches_ahead=self._batches_ahead,
            device=self._device,
        )

    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        positions = [self._position_N[sample_B.numpy()] for sample_B in batches]

        def crops(number: int) -> npt.NDArray[np.int64]:
            rows_B = self._source.images[positions[number]]
            heights_B, widths_B = (torch.from_numpy(rows_B[key].astype(np.int64)) for key in ("height", "width"))
            return torch.stack(self._crops(epoch, batches[number], heights_B, widths_B), dim=1).numpy()

        def fallback(number: int, i: int) -> npt.NDArray[np.uint8]:
            return self._encoded.view(int(batches[number][i]), crops(number)[i].tolist())

        with closing(self._loader.read(positions, crops, fallback)) as reading:
            for (images_BHWC,) in reading:
                yield images_BHWC


def check_installed() -> None:
    """Raise ValueError where FFCV is not installed, or does not work."""
    optional.load(
        "engine.pipelines.ffcv.repairs",
        missing="pipeline: ffcv needs `make setup-ffcv`, or `pip install 'iad-engine[ffcv]'` where its libraries "
        "are ({reason})",
    )
