"""Pipeline of a plain install: Pillow decodes, cuts, resizes and augments images, by threads. B batch, H, W."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.common.lookup import check_known
from engine.common.numbers import ceil_div
from engine.config import ColourJitterConfig
from engine.pipelines.crops import RANDOM_RESIZED_CROP
from engine.pipelines.images.augmentation import AUGMENTATIONS, Augmentation
from engine.pipelines.prefetching import PrefetchingPipeline, prefetched
from engine.pipelines.reading.decoding import open_image
from engine.pipelines.reading.encoded import EncodedImages, cut
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split

_IMAGES_PER_TASK = 8  # at most: their crops are drawn together


class ImagePipeline(PrefetchingPipeline):
    """`PrefetchingPipeline` that needs no further package, and augments. Its pixels are `EncodedImages.view`'s.

    augmentation: names of `AUGMENTATIONS`, in order; first may stand "random-resized-crop": `random_crops` of
    images of one size, too, in place of the crop and flip of `TensorPipeline`. colour_jitter: its strengths.
    Raises ValueError too for augmentation without `augment`.
    """

    def __init__(
        self,
        data: Split | EncodedImages,
        sampling: Sampling,
        *,
        augment: bool,
        augmentation: tuple[str, ...] = (),
        colour_jitter: ColourJitterConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, sampling, augment=augment, **options)
        if augmentation and not augment:
            raise ValueError(f"augmentation: {', '.join(augmentation)}, and augment is false")
        crops = augmentation[:1] == (RANDOM_RESIZED_CROP,)
        names = augmentation[crops:]
        for name in names:
            check_known("augmentation", name, AUGMENTATIONS)
        self._cuts = self._cuts or crops
        self._augmentation = Augmentation(names, colour_jitter or ColourJitterConfig())
        self._images_per_task = min(_IMAGES_PER_TASK, ceil_div(sampling.images_per_rank, self._workers))

    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        begun: deque[Tensor] = deque()

        def tasks() -> Iterator[tuple[Tensor, Tensor]]:
            for sample_B in batches:
                shape, pinned = (len(sample_B), *self._data.shape, 3), self._device.type == "cuda"
                begun.append(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))
                parts = (tensor.split(self._images_per_task) for tensor in (begun[-1], sample_B))
                yield from zip(*parts, strict=True)

        ahead = self._batches_ahead * ceil_div(self._sampling.images_per_rank, self._images_per_task)
        with ThreadPoolExecutor(self._workers) as pool, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            done = prefetched(pool, partial(self._fill, epoch), tasks(), ahead)
            for sample_B in batches:
                for _ in range(ceil_div(len(sample_B), self._images_per_task)):
                    next(done)
                yield begun.popleft().to(self._device, non_blocking=True)

    def _fill(self, epoch: int, task: tuple[Tensor, Tensor]) -> None:
        """Write the views, uint8 BHWC, of samples."""
        views_BHWC, sample_B = task
        samples = sample_B.tolist()
        contents, heights, widths = zip(*map(self._read, samples), strict=True)
        crops = torch.stack(self._crops(epoch, sample_B, torch.tensor(heights), torch.tensor(widths)), dim=1)
        changes = self._augmentation.draw(self._sampling.seed, epoch, sample_B)
        views = views_BHWC.numpy()
        for i, crop in enumerate(crops.tolist()):
            image = self._decoded(samples[i], contents[i])
            view = cut(image, crop, self._data.shape) if self._cuts else image
            for change in changes[i]:
                view = change(view)
            views[i] = view

    def _read(self, sample: int) -> tuple[bytes | None, int, int]:
        """Bytes to decode, if any, and the image's height and width."""
        return (None, *self._data.shape) if isinstance(self._data, Split) else self._data.read(sample)

    def _decoded(self, sample: int, content: bytes | None) -> Image.Image:
        if isinstance(self._data, Split):
            return Image.fromarray(self._data.images[sample].numpy())
        assert content is not None
        with suppress(Exception), open_image(content) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        return Image.fromarray(self._data.decode(sample))  # raises what is wrong with the file
