"""Class names of a checkpoint and of data, compared: the number of classes alone does not tell which is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def order(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Index in the checkpoint of each of the data's classes; None where both have them in the same order.

    Raises ValueError, with a name from each side, where they are not the same classes.
    """
    if list(theirs) == list(ours):
        return None
    place = {name: index for index, name in enumerate(theirs)}
    known = set(ours)
    unknown = next((name for name in theirs if name not in known), None)
    missing = next((name for name in ours if name not in place), None)
    if unknown is None and missing is None and len(theirs) == len(ours):
        return [place[name] for name in ours]
    parts = [f"it has {_shown(unknown)}" if unknown is not None else ""]
    parts += [f"the data have {_shown(missing)}" if missing is not None else ""]
    difference = ", and ".join(part for part in parts if part) or "a name is there twice"
    raise ValueError(
        f"its {len(theirs)} classes are not the {len(ours)} of the data: {difference}{_hint(theirs, ours)}"
    )


def found_in(payload: Mapping[object, object]) -> tuple[str, ...] | None:
    """The class names that a checkpoint from elsewhere tells, under the names that are usual for them."""
    for key in ("class_names", "classes"):
        names = payload.get(key)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    index = payload.get("class_to_idx")
    if not isinstance(index, Mapping) or not index:
        return None
    if not all(isinstance(name, str) and type(place) is int for name, place in index.items()):
        return None
    return tuple(sorted(index, key=index.__getitem__)) if sorted(index.values()) == [*range(len(index))] else None


def summary(names: Sequence[str]) -> str:
    """Some of the names, in their order."""
    chosen = list(names) if len(names) <= 5 else [*names[:4], "...", names[-1]]
    return ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in chosen)


def _hint(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Names such as 00 and 0 are of the same class, probably; which, only the user knows."""
    numbers = all(name.isdecimal() and len(name) < 10 for name in (*theirs, *ours))
    if numbers and sorted(map(int, theirs)) == sorted(map(int, ours)):
        return "; as numbers they are the same: rename the folders of the data as the checkpoint has them"
    if sorted(name.casefold() for name in theirs) == sorted(name.casefold() for name in ours):
        return "; but for capital letters they are the same: rename the folders as the checkpoint has them"
    return ""


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
