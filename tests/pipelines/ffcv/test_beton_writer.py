"""Writing .beton files: what is read back, by us and by FFCV; and that nothing is lost or left when it fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipelines import ffcv
from engine.pipelines.crops import Crops
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.ffcv.beton_writer import BetonFormat
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import encoded_splits
from engine.pipelines.splits import Request, Split
from tests.pipelines.ffcv.test_pipeline import JPEG, assert_near, by_areas
from tests.pipelines.loaders import ARRAYS, COUNT, FILES, SIZES
from tests.pipelines.photographs import encode, in_memory, smooth

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def with_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.beton"


def shared_memory() -> set[Path]:
    """Segments that any process has left."""
    return set(Path("/dev/shm").glob("psm_*"))  # noqa: S108  # where Python puts them


def files_of(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


# ---------------------------------------------------------------- what is read back


def test_jpeg_files_are_kept_byte_for_byte(path: Path) -> None:
    grey = encode(Image.fromarray(smooth(50, 20, 30)).convert("L"))
    beton_writer.write(path, [in_memory(*FILES, grey)], BetonFormat("jpeg"))
    written = beton.read(path)
    assert [written.encoded(number) for number in range(COUNT + 1)] == [*FILES, grey]
    assert [(int(row["height"]), int(row["width"])) for row in written.images] == [*SIZES, (20, 30)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_others_and_at_a_quality_all_are_encoded(kind: str, path: Path) -> None:
    pictures = [smooth(number, 40, 56) for number in range(3)]
    files = in_memory(*(encode(picture, kind) for picture in pictures))
    sizes = {}
    for quality in (None, 40, 95) if kind == "PNG" else (40, 95):
        beton_writer.write(path, [files], BetonFormat("jpeg", quality))
        written = beton.read(path)
        sizes[quality] = written.sizes.sum()
        assert (written.images["mode"] == beton.JPEG).all()
        for number, picture in enumerate(pictures):
            assert written.encoded(number) != files.read(number)[0]
            difference = np.abs(written.listings()[""].decode(number).astype(int) - picture)
            assert difference.mean() < (6 if quality == 40 else 3)
    assert sizes[40] < sizes[95]
    if kind == "PNG":
        beton_writer.write(path, [files], BetonFormat("jpeg", 90))
        assert beton.read(path).sizes.sum() == sizes[None]


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
def test_the_longer_side_is_shrunk_to_the_maximum(mode: str, path: Path) -> None:
    shapes = [(40, 80), (80, 40), (30, 20), (40, 40)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    beton_writer.write(path, [in_memory(*files)], BetonFormat(mode, max_resolution=40))
    written = beton.read(path)
    assert [(int(row["height"]), int(row["width"])) for row in written.images] == [
        (20, 40),
        (40, 20),
        (30, 20),
        (40, 40),
    ]
    kept = [written.encoded(number) == files[number] for number in range(4)]
    assert kept == [False, False, mode == "jpeg", mode == "jpeg"]


def test_both_parts_and_names_of_any_letters(path: Path) -> None:
    named = replace(ARRAYS, class_names=("a", "Käse", "雪", "two words", "e/f"))
    test = named.take(torch.tensor([4, 8, 2, 1, 5]))
    told: list[tuple[str, int, int]] = []
    beton_writer.write(path, [named, test], progress=lambda *report: told.append(report))
    assert told == [("train", done + 1, COUNT) for done in range(COUNT)] + [("test", i + 1, 5) for i in range(5)]
    train_images, test_images = encoded_splits(*beton.splits(path, Request()), Request())
    for written, images in ((train_images, named), (test_images, test)):
        assert written.class_names == images.class_names
        assert torch.equal(written.labels, images.labels)
        assert torch.equal(written.images[torch.arange(len(images))], images.images)


def test_the_same_images_give_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        beton_writer.write(
            tmp_path / f"{name}.beton", [in_memory(*FILES), in_memory(*FILES[:5])], BetonFormat("jpeg")
        )
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


PLAIN = """
import sys
from tests.pipelines.ffcv.plain_ffcv import import_plainly
import_plainly()
import numpy as np
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

def read(path, decoder):
    loader = Loader(path, batch_size=16, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    pipelines={"image": [decoder], "label": [IntDecoder()], "class_name": None})
    batches = [(images.copy(), labels[:, 0].copy()) for images, labels in loader]
    return map(np.concatenate, zip(*batches))

images, labels = read(sys.argv[1], SimpleRGBImageDecoder())
centres, _ = read(sys.argv[2], CenterCropRGBImageDecoder((16, 16), 224 / 256))
np.savez(sys.argv[3], images=images, labels=labels, centres=centres)
"""


def test_ffcv_s_own_loader_and_decoders_read_our_files(tmp_path: Path) -> None:
    raw, jpeg, read = tmp_path / "raw.beton", tmp_path / "jpeg.beton", tmp_path / "read.npz"
    beton_writer.write(raw, [ARRAYS])
    beton_writer.write(jpeg, [in_memory(*FILES)], BetonFormat("jpeg"))
    command: list[str | Path] = [sys.executable, "-c", PLAIN, raw, jpeg, read]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sides = torch.tensor([min(size) * 7 // 8 for size in SIZES])
    heights, widths = torch.tensor(SIZES).T
    crops = Crops((heights - sides) // 2, (widths - sides) // 2, sides, sides, torch.zeros_like(sides))
    with np.load(read) as found:
        np.testing.assert_array_equal(found["images"], ARRAYS.images.numpy())
        np.testing.assert_array_equal(found["labels"], ARRAYS.labels.numpy())
        centres = torch.from_numpy(found["centres"]).permute(0, 3, 1, 2) / 255
    assert_near(centres, by_areas(FILES, crops, 16), JPEG)


# ---------------------------------------------------------------- what goes wrong


def test_an_image_that_cannot_be_read_leaves_all_as_it_was(path: Path) -> None:
    path.write_text("before")
    shared = shared_memory()
    with pytest.raises(ValueError, match=r"^data: X/9 is not a readable image"):
        beton_writer.write(path, [in_memory(*FILES[:9], b"nothing", *FILES[10:])], BetonFormat("jpeg"))
    assert path.read_text() == "before"
    assert files_of(path) == ["x.beton"]
    assert shared_memory() <= shared


def test_raw_pixels_beyond_a_page_are_refused(path: Path) -> None:
    large = Split(torch.zeros(2, 1700, 1700, 3, dtype=torch.uint8), torch.arange(2), ("a", "b"))
    with pytest.raises(ValueError, match=r"^data: image 0 has 8,670,000 bytes and a page holds 8 MiB; give"):
        beton_writer.write(path, [large])
    assert files_of(path) == []
    beton_writer.write(path, [large], BetonFormat("jpeg"))
    assert len(beton.read(path)) == 2


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.splits import Split
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pixels = torch.zeros(900, 100, 100, 3, dtype=torch.uint8)  # three pages
images = Split(pixels, torch.arange(900) % 2, ("a", "b"))
path = Path(sys.argv[1])
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        beton_writer.write(path, [images])
    except OSError as error:
        print(limit, error.errno, path.read_text(), len(list(path.parent.iterdir())), flush=True)
"""


def test_a_full_disk_is_an_error_and_nothing_is_lost(path: Path) -> None:
    """Wherever it fills: in the head, in a page, between two, and in the table at the end."""
    path.write_text("before")
    page = 8 << 20
    limits = [1000, page + 5, 2 * page, 3 * page + 1234, 4 * page - 1, 4 * page, 5 * page + 100]
    shared = shared_memory()
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, *map(str, limits)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    told = [line.split() for line in done.stdout.splitlines()]
    assert [int(line[0]) for line in told] == limits, done.stderr
    assert {line[1] for line in told} <= {"27", "28"}  # too large, no space
    assert {(line[2], line[3]) for line in told} == {("before", "1")}
    assert shared_memory() <= shared


KILLED = """
import sys
from pathlib import Path
import torch
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.splits import Split
images = Split(torch.zeros(50_000, 32, 32, 3, dtype=torch.uint8), torch.arange(50_000) % 2, ("a", "b"))
beton_writer.write(Path(sys.argv[1]), [images], progress=lambda part, done, total: print(done, flush=True))
"""


def test_a_writer_that_is_killed_leaves_the_old_file(path: Path) -> None:
    path.write_text("before")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) > 5000:
            break
    writer.send_signal(signal.SIGKILL)
    writer.stdout.close()
    assert writer.wait(30) == -signal.SIGKILL
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "png"}, r"^format: 'png' is not known; known: jpeg, raw$"),
        ({"mode": "jpeg", "quality": 0}, "^quality must be 1 to 100, got 0$"),
        ({"mode": "jpeg", "quality": 101}, "^quality must be 1 to 100, got 101$"),
        ({"quality": 90}, "^quality: raw pixels have none, got 90; give the format jpeg$"),
        ({"max_resolution": 0}, "^max_resolution must be 1 or more, got 0$"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BetonFormat(**values)  # type: ignore[arg-type]
