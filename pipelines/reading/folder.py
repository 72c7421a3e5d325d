"""Image folders: `train/<class>/*` and `test/<class>/*` (or `val/`), or `<class>/*`; or zip archives of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engine.pipelines.reading.decoding import is_image, is_named_as_image
from engine.pipelines.reading.held_out import HeldOut, hold_out, label_of, portable
from engine.pipelines.reading.tree import Tree, archive, directory

# Names of splits, in any case; of several that are there the first one counts.
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True, eq=False)
class Files:
    """The image files of one split: for each class, sorted names in the tree. strays: the files that are none."""

    tree: Tree
    by_class: dict[str, list[str]]
    strays: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label: sorted."""
        return tuple(sorted(self.by_class))

    def __len__(self) -> int:
        return sum(map(len, self.by_class.values()))

    def held_out(self) -> tuple[Files, Files, HeldOut]:
        """(train, test, names of the latter): the files split by the rule of `hold_out`."""
        chosen = hold_out(self.by_class, self.tree.where())
        train, test = (
            replace(self, by_class={each: list(filter(wanted, names)) for each, names in self.by_class.items()})
            for wanted in (lambda name: name not in chosen, lambda name: name in chosen)
        )
        test = replace(test, strays=())  # counted once
        labels = [label_of(each, name) for each in self.class_names for name in test.by_class[each]]
        return train, test, HeldOut(tuple(labels), len(self))


@dataclass(frozen=True)
class ImageFolder:
    """The files of both splits. notes: sentences for the user. held_out: the test files that a rule chose."""

    train: Files
    test: Files
    notes: tuple[str, ...] = ()
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Wanted:
    """Splits that are to be read of an image folder.

    only_test: training images need not be there; the test files are given for them, too. whole: then a flat folder
    of classes, without train/ and test/, is of test images only. may_split: where there are no test images, a
    fifth of each class is held out by `hold_out`.
    """

    only_test: bool = False
    whole: bool = False
    may_split: bool = True


BOTH = Wanted()


@contextmanager
def opened(path: Path, wanted: Wanted = BOTH) -> Iterator[ImageFolder]:
    """`image_folder` whose archives stay open inside the context."""
    with ExitStack() as stack:
        yield _read(path, stack, wanted)


def image_folder(path: Path, wanted: Wanted = BOTH) -> ImageFolder:
    """The train and test files of an image folder; archives stay open as long as these are used.

    path: a folder or a zip archive with train/ and test/ (val/), of which a folder may hold train.zip and test.zip
    (val.zip) instead. These hold `<class>/*` or `<class>/images/*`, a train.zip also `train/<class>/*`. Where
    there is a test, val is not read. Where there is neither, or the classes lie in the path itself: see `Wanted`.
    Files in the folder of a class that are no images are left out, and counted in the notes.
    Raises ValueError in one line that names what is missing, empty or different between the two.
    """
    with ExitStack() as stack:
        found = _read(path, stack, wanted)
        stack.pop_all()  # an archive closes itself when nobody holds it
        return found


def is_named_as_test(path: Path) -> bool:
    """True if a folder or archive is called test, val, ..."""
    return path.name.removesuffix(".zip").casefold() in _TEST


def _read(path: Path, stack: ExitStack, wanted: Wanted) -> ImageFolder:
    if not path.exists():
        raise ValueError(f"data: {path} does not exist")
    tree = below_single_folder(directory(path, "*") if path.is_dir() else archive(path, stack))
    has_train, has_test = (_find(tree, names) is not None for names in (_TRAIN, _TEST))
    is_flat = wanted.may_split and not has_train and not has_test and bool(tree.tops)
    if has_test and (has_train or wanted.only_test):
        train = None if wanted.only_test else by_class(_split(tree, _TRAIN, stack))
        test = by_class(_split(tree, _TEST, stack))
        train = train or test
        check_same_classes(train, test)
        return ImageFolder(train, test, notes(train, test))
    if not (is_flat or (has_train and wanted.may_split)):
        _split(tree, _TEST if has_train or wanted.only_test else _TRAIN, stack)  # raises what is missing
    every = by_class(tree.listed("*", "*/*") if is_flat else _split(tree, _TRAIN, stack))
    if is_flat and wanted.only_test and wanted.whole:
        note = f"the classes lie in {tree.where()} itself: all of its {len(every):,} images are test images"
        return ImageFolder(every, every, (note, *notes(every)))
    train, test, held_out = every.held_out()
    note = (
        f"{tree.where()} has no test images of its own: {len(test):,} of its {len(every):,} images, a fifth of "
        "each class chosen by their names, are the test split"
    )
    return ImageFolder(test if wanted.only_test else train, test, (note, *notes(every)), held_out)


def below_single_folder(tree: Tree) -> Tree:
    """The tree below the single folder at its top, as archives of a whole folder have one; else the tree."""
    while len(tree.tops) == 1 and _find(tree, _TRAIN + _TEST) is None:
        below = tree.under(f"{min(tree.tops)}/").listed("*")
        if not below.tops:
            break
        tree = below
    return tree


def _find(tree: Tree, names: tuple[str, ...]) -> str | None:
    """The folder "train/", or in a folder the archive "train.zip", of the first of those names that is there."""
    there: dict[str, list[str]] = {}
    for top in tree.tops:
        there.setdefault(f"{top.casefold()}/", []).append(f"{top}/")
    for file in tree.packed if tree.root else ():
        there.setdefault(file.casefold(), []).append(file)
    for name in names:
        for entry in (f"{name}/", f"{name}.zip"):
            if found := there.get(entry):
                if len(found) > 1:
                    raise ValueError(f"data: {tree.where()} holds both {' and '.join(sorted(found))}")
                return found[0]
    return None


def _split(tree: Tree, names: tuple[str, ...], stack: ExitStack) -> Tree:
    """The tree of a split. Raises ValueError where it is not there."""
    found = _find(tree, names)
    if found is None:
        wanted = [name for name in ("train", "test", "val") if name in names]
        either = " or {}.zip" if tree.root else ""
        missing = " and no ".join(f"{name}/{either.format(name)}" for name in wanted)
        hint = f"; unpack {tree.packed[0]} first" if tree.packed else ""
        raise ValueError(f"data: {tree.where()} holds no {missing}{hint}")
    if found.endswith("/"):
        return tree.under(found).listed("*", "*/*")
    assert tree.root is not None
    inside = archive(tree.root / tree.prefix / found, stack)
    # Only if no folder stands beside it: "train" may be a class.
    only = inside.tops and {top.casefold() for top in inside.tops} == {found.removesuffix(".zip").casefold()}
    return inside.under(f"{min(inside.tops)}/") if only else inside


def by_class(tree: Tree) -> Files:
    """Group `<class>/<file>`; files beside the class folders belong to no class and are left out.

    Where every class holds one folder of the same name and no image, that holds its images: `<class>/images/*`.
    Raises ValueError for less than two classes, for a class without images, and for other folders in it.
    """
    folders: dict[str, str] = {}  # the name of a class -> its folder
    files: dict[str, list[str]] = {}
    below: dict[str, set[str]] = {}
    for name in tree.names:
        folder, slash, file = name.partition("/")
        if not slash:
            continue
        class_name = _class_name(tree, folder)
        if folders.setdefault(class_name, folder) != folder:
            raise ValueError(f"data: {tree.where()} holds two folders called {class_name!r}, spelled differently")
        subfolder, slash, _ = file.partition("/")
        if slash:
            below.setdefault(class_name, set()).add(subfolder)
        elif file:
            files.setdefault(class_name, []).append(name)
    if len(folders) < 2:
        found = f"only the class {min(folders)!r}" if folders else "no class folder"
        hint = f"; unpack {tree.packed[0]} first" if tree.packed and not folders else ""
        raise ValueError(f"data: {tree.where()} holds {found}; two classes or more are needed{hint}")
    images, strays = images_of(tree, files)
    if below:
        subfolder = _single_subfolder(tree, folders, images, below)
        tree = tree.listed(f"*/{subfolder}/*")
        nested = _nested(tree, folders, subfolder)
        images, more = images_of(tree, nested)
        strays += more
    for class_name in folders:
        if not images.get(class_name):
            raise ValueError(f"data: {tree.where(folders[class_name])} holds no image")
    return Files(tree, images, tuple(strays))


def _class_name(tree: Tree, folder: str) -> str:
    """The class of a folder. Raises ValueError where its name is no text."""
    try:
        folder.encode()
    except UnicodeEncodeError:  # checkpoints and tables could not hold it
        raise ValueError(f"data: {tree.where(folder)}: the name of a class must be UTF-8") from None
    return portable(folder)


def _single_subfolder(
    tree: Tree, folders: dict[str, str], images: dict[str, list[str]], below: dict[str, set[str]]
) -> str:
    """The folder that every class holds in place of images. Raises ValueError where they differ."""
    names = set().union(*below.values())
    if len(names) > 1 or below.keys() != folders.keys() or any(images.values()):
        where = next(f"{folders[each]}/{name}" for each in sorted(below) for name in sorted(below[each]))
        raise ValueError(f"data: {tree.where(where)}: a class folder must hold images only, and no folder")
    return names.pop()


def _nested(tree: Tree, folders: dict[str, str], subfolder: str) -> dict[str, list[str]]:
    """The files in that folder of each class. Raises ValueError for folders in it."""
    class_names = {folder: class_name for class_name, folder in folders.items()}
    nested: dict[str, list[str]] = {}
    for name in tree.names:
        folder, _, rest = name.partition("/")
        file = rest.removeprefix(f"{subfolder}/")
        if rest == file or not file:
            continue
        if "/" in file:
            raise ValueError(f"data: {tree.where(name)}: a class folder must hold images only, and no folder")
        nested.setdefault(class_names[folder], []).append(name)
    return nested


def images_of(tree: Tree, files: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """Files by class that are images, and the others; those not named like images are looked into, by threads."""
    unclear = [name for names in files.values() for name in names if not is_named_as_image(name)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(is_image, tree), unclear)
        strays = [name for name, is_one in zip(unclear, found, strict=True) if not is_one]
    left_out = set(strays)
    return {each: [name for name in names if name not in left_out] for each, names in files.items()}, strays


def check_same_classes(train: Files, test: Files) -> None:
    """Raise ValueError, naming the first ones, where the splits have different classes."""
    only = [
        f"only in {files.tree.where()}: {', '.join(sorted(extra)[:5])}{', ...' if len(extra) > 5 else ''}"
        for files, other in ((train, test), (test, train))
        if (extra := files.by_class.keys() - other.by_class.keys())
    ]
    if only:
        folded = [{each.casefold() for each in files.by_class} for files in (train, test)]
        hint = "; they differ in upper and lower case alone" if folded[0] == folded[1] else ""
        raise ValueError(f"data: train and test must have the same classes; {'; '.join(only)}{hint}")


def notes(*splits: Files) -> tuple[str, ...]:
    """Sentences on files that are left out, and on classes whose names are nearly the same."""
    found = []
    for files in dict.fromkeys(splits):
        if files.strays:
            first = files.tree.where(files.strays[0])
            found.append(f"files that are no images are left out: {len(files.strays):,}, the first {first}")
    alike: dict[str, list[str]] = {}
    for class_name in splits[0].class_names:
        alike.setdefault(class_name.casefold(), []).append(class_name)
    for names in alike.values():
        if len(names) > 1:
            found.append(f"classes whose names differ in upper and lower case alone: {', '.join(names)}")
    return tuple(found)
