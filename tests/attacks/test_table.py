"""The table of attacks: names and patterns, and the user's own."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.autoattack import AA_PARTS, PARTS, defined_parts, describe_part
from engine.attacks.pgd import PRESETS, describe, preset, presets

LINF, L2 = (8 / 255, "Linf"), (0.5, "L2")


@pytest.fixture(autouse=True)
def no_attacks_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_added", {})


def mine(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x


def other(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x


def test_the_built_in_attacks_have_names_and_titles_of_their_own() -> None:
    assert table.names() == (
        "natural",
        *presets(),
        "apgd-ce",
        "apgd-dlr",
        "apgd-t",
        "fab-t",
        "square",
        "aa",
        "aa-fast",
        "aa:tf32",
        "aa:package",
    )
    pgd, parts = "FGSM, FGSM-RS, PGD-10, PGD-20, PGD-20 DLR, CW-inf", "APGD-CE, APGD-DLR, APGD-T, FAB-T, Square"
    assert (
        ", ".join(attack.title for attack in table.ATTACKS.values())
        == f"Natural, {pgd}, {parts}, AA, AA-fast, AA (TF32), AA (package)"
    )
    assert all(table.find(name).name == name for name in table.names())


@pytest.mark.parametrize("ball", [LINF, L2], ids=["Linf", "L2"])
@pytest.mark.parametrize(
    ("name", "steps", "loss", "title"),
    [
        ("pgd1", 1, "ce", "PGD-1"),
        ("pgd50", 50, "ce", "PGD-50"),
        ("pgd50-dlr", 50, "dlr", "PGD-50 DLR"),
        ("pgd100-cw", 100, "cw", "PGD-100 CW"),
    ],
)
def test_a_number_of_steps_in_the_name(
    name: str, steps: int, loss: str, title: str, ball: tuple[float, str]
) -> None:
    attack, spec = table.find(name), preset(name, *ball)
    assert (spec.num_steps, spec.loss, spec.step_size, spec.random_start) == (steps, loss, ball[0] / 4, "uniform")
    assert (spec.bn, spec.epsilon, spec.threat_model) == ("eval", *ball)
    assert (attack.name, attack.title) == (name, title)
    assert attack.numbers(10, ball) == describe(spec)


def test_a_pattern_makes_the_attacks_that_have_names() -> None:
    assert preset("pgd30-cw", *LINF) == preset("cw", *LINF)
    for name in PRESETS:
        assert table.find(name).numbers(10, LINF) == describe(presets()[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pdg20", "attack: 'pdg20' is not known; did you mean 'pgd20'"),
        ("pgd0", "attack: 'pgd0' is not known"),
        ("pgd020", "'pgd020' is not known"),
        ("pgd1000000", "'pgd1000000' is not known"),
        ("pgdN", "'pgdN' is not known"),
        ("PGD20", "'PGD20' is not known"),
        ("pgd20-hinge", "'pgd20-hinge' is not known; "),
        ("transfer:", "'transfer:' names no checkpoint; expected transfer:CKPT or transfer:CKPT:ATTACK"),
        ("transfer:a.pt:pdg20", "attack: 'pdg20' is not known; did you mean 'pgd20'"),
        ("transfer:a.pt:natural", "natural crafts nothing that is transferred"),
        ("transfer:a.pt:aa", "aa crafts nothing that is transferred"),
        ("transfer:nowhere.pt", "transfer:nowhere.pt: there is no file nowhere.pt"),
        ("transfer:nowhere.pt:pgd50", "transfer:nowhere.pt:pgd50: there is no file nowhere.pt"),
    ],
)
def test_an_unknown_name_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        table.resolve([name])
    assert "\n" not in str(caught.value)


def test_an_attack_that_is_not_defined_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="needs 4 classes, and the model has 3; defined: natural, ") as caught:
        table.check_defined(table.find("apgd-t"), 3, "Linf")
    defined = str(caught.value).partition("defined: ")[2].split(", ")
    assert defined == [name for name in table.names() if name != "apgd-t"]
    with pytest.raises(ValueError, match="transfer:a.pt:apgd-dlr: needs 3 classes, and the model has 2"):
        table.check_defined(table.find("transfer:a.pt:apgd-dlr"), 2, "L2")
    for name in table.names():
        table.check_defined(table.find(name), 4, "Linf")


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        (2, ("natural", "apgd-ce", "fab-t", "square")),
        (3, ("natural", "apgd-ce", "fab-t", "square")),
        (4, AA_PARTS),
        (100, AA_PARTS),
    ],
)
def test_autoattack_is_named_after_the_parts_that_are_run(classes: int, parts: tuple[str, ...]) -> None:
    aa = table.find("aa")
    assert aa.parts(classes) == defined_parts(classes) == parts
    result = {"parts": dict.fromkeys(parts, 0.5)}
    whole = parts == AA_PARTS
    assert table.title("aa", result) == ("AA" if whole else "AA without APGD-T")
    assert ("standard" in aa.numbers(classes, LINF)) == whole
    assert (f"without APGD-T, which {classes} classes do not define" in aa.numbers(classes, LINF)) != whole


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_numbers_in_words_are_those_of_the_package(norm: str) -> None:
    package = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    found = package.AutoAttack(nn.Identity(), norm=norm, eps=0.25, version="standard")
    for attack in (found.apgd, found.apgd_targeted):
        assert (attack.n_iter, attack.n_restarts, attack.eot_iter, attack.thr_decr) == (100, 1, 1, 0.75)
    assert (found.fab.n_iter, found.fab.n_restarts) == (100, 1)
    assert (found.square.n_queries, found.square.n_restarts, found.square.loss) == (5000, 1, "margin")
    for part in ("apgd-ce", "apgd-dlr", "apgd-t"):
        assert "100 steps, the first of 2 epsilon, from one random start" in PARTS[part].numbers
    assert "100 steps" in PARTS["fab-t"].numbers
    assert "5,000 queries, margin" in PARTS["square"].numbers
    assert "each of 9 target classes" in describe_part("apgd-t", 100, "Linf", 0.1)
    assert "each of 1 target class," in describe_part("fab-t", 2, "Linf", 0.1)


# ---------------------------------------------------------------- the user's own


def test_an_attack_of_the_user_is_one_of_the_table() -> None:
    table.add("mine", mine, title="Mine", summary="7 steps", source="me", least_classes=3, threat_models=["L2"])
    assert table.names()[-1] == "mine"
    found = table.find("mine")
    assert (found.title, found.source, found.least_classes, found.threat_models) == ("Mine", "me", 3, ("L2",))
    assert found.numbers(10, L2) == "L2, epsilon 0.5, 7 steps"
    assert table.find("transfer:a.pt:mine").title == "Mine from a.pt"
    with pytest.raises(ValueError, match="mine: is defined for L2, and not for Linf"):
        table.check_defined(found, 10, "Linf")
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        table.find("mien")
    table.add("mine", mine)  # as a cell of a notebook that is run again
    assert table.find("mine").title == "mine"


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        (("pgd20", mine), {}, "attack: 'pgd20' is a built-in attack; give yours another name"),
        (("pgd77", mine), {}, "'pgd77' is a built-in attack"),
        (("natural", mine), {}, "'natural' is a built-in attack"),
        (("transfer:x", mine), {}, "a name of letters, digits, .* is needed, got 'transfer:x'"),
        (("a,b", mine), {}, "a name of letters"),
        (("", mine), {}, "a name of letters"),
        ((7, mine), {}, "a name of letters, .* got 7"),
        (("mine", 7), {}, r"attack 'mine': expected a function f\(model, x, y\), got int"),
        (("mine", mine), {"least_classes": 0}, "least_classes: expected a whole number from 1 on, got 0"),
        (("mine", mine), {"threat_models": ["L1"]}, "threat_models: 'L1' is not known; known: L2, Linf"),
        (("mine", mine), {"threat_models": []}, "threat_models: none is given; known: Linf, L2"),
        (("mine", mine), {"title": "AA"}, "attack 'mine': another has the title 'AA'"),
        (("theirs", mine), {}, "attack: 'theirs' is that of tests.attacks.test_table.other already"),
    ],
)
def test_what_cannot_be_added_is_one_line(arguments: tuple[Any, Any], keys: dict[str, Any], message: str) -> None:
    table.add("theirs", other)
    with pytest.raises(ValueError, match=message) as caught:
        table.add(*arguments, **keys)
    assert "\n" not in str(caught.value)
    assert table.names()[len(table.ATTACKS) :] == ("theirs",)


class Called:
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("attacks", "names"),
    [
        (["pgd20", mine, "pgd20"], ["pgd20", "mine"]),
        ([("a", mine), ["b", mine]], ["a", "b"]),
        ({"a": mine, "b": other}, ["a", "b"]),
        ((table.find("pgd5"), Called()), ["pgd5", "Called"]),
        ([mine, mine], ["mine"]),
        ([], []),
    ],
)
def test_lists_of_attacks(attacks: Any, names: list[str]) -> None:
    assert [attack.name for attack in table.resolve(attacks)] == names


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ("pgd20", "attacks: expected a list of names such as 'pgd20', got 'pgd20'"),
        (mine, "attacks: expected a list of names such as 'pgd20', got <function mine"),
        ([7], "attacks: expected names such as 'pgd20', functions, or pairs of both, got 7"),
        ([("mine", 7)], r"or pairs of both, got \('mine', 7\)"),
        ([("pgd20", mine)], "'pgd20' is a built-in attack"),
        ([lambda model, x, y: x], "a name of letters, digits, .* is needed, got '<lambda>'"),
        ([("a", mine), ("a", other)], "attacks: two functions are called 'a'"),
        ({"aa": mine}, "'aa' is a built-in attack"),
    ],
)
def test_what_is_no_list_of_attacks_is_one_line(attacks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        table.resolve(attacks)
    assert "\n" not in str(caught.value)
