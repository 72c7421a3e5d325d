"""Loading a configuration: what wins over what, exact round trips, and errors of one line."""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine import config
from engine.common import yaml_text
from engine.common.lookup import nearest
from engine.config import (
    AttackSpec,
    LossConfig,
    RunConfig,
    epochs_of,
    explicit,
    load,
    merge,
    parse_assignment,
    read_file,
    validated,
)
from engine.methods import METHODS
from tests import key_tables


def resolved(config: RunConfig) -> Any:
    """Read again what a run writes as config.yaml."""
    return yaml_text.read(yaml_text.write(config.tree()))


def test_overrides_win_over_the_file_and_the_file_over_the_defaults() -> None:
    file = {"method": "iad2", "lr": 0.05, "loss": {"beta": 0.5, "lam1": 0.3}}
    config = load(file, {"loss": {"beta": 0.7}}, {"lr": 0.2}, {"lr": 0.4})
    assert config.method == "iad2"
    assert config.lr == 0.4
    assert (config.loss.beta, config.loss.lam1, config.loss.lam2) == (0.7, 0.3, 0.5)
    assert config.loss.warmup == 0.2  # of iad2, not the 0.3 of the default method
    assert config.attack.bn == "train"


def test_an_override_of_the_semantics_brings_its_defaults() -> None:
    assert load({"method": "iad1"}, {"semantics": "official"}) == load({"method": "iad1", "semantics": "official"})
    assert load({"semantics": "official", "validation": 0.1}).validation == 0.1


def test_nothing_given_is_iad1_of_the_paper() -> None:
    assert load({}) == load({"method": "iad1", "semantics": "paper"})
    assert load({}).loss.warmup == 0.3


NUMBERS = st.floats(1e-12, 1e12) | st.integers(1, 10**6)
TREES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(sorted(METHODS)),
        "semantics": st.sampled_from(("paper", "official")),
        "epochs": st.integers(1, 400),
    },
    optional={
        "lr": NUMBERS,
        "seed": st.integers(0, 2**63 - 1),
        "validation": st.floats(0, 1, exclude_max=True),
        "data": st.none() | st.text(min_size=1, max_size=8).filter(lambda path: "\0" not in path),
        "model": st.sampled_from(("resnet18", "1e3", "on", "null", "8/255", "")),
        "loss": st.fixed_dictionaries(
            {},
            optional={
                "beta": NUMBERS,
                "warmup": st.just(0) | st.just(0.3) | st.integers(1, 300),
                "weights": st.dictionaries(
                    st.sampled_from(("ce_nat", "kl_self")), NUMBERS | st.tuples(NUMBERS, NUMBERS)
                ),
            },
        ),
        "attack": st.fixed_dictionaries(
            {}, optional={"epsilon": st.sampled_from(("8/255", 8 / 255, 0)), "bn": st.just("eval")}
        ),
        "optim": st.just({"milestones": ["1/3", 0.5, 300], "lr_factors": [0.5, 0.1, 1e-5]}),
        "teacher_st": st.fixed_dictionaries({}, optional={"model": st.none(), "seed": st.just(3)}),
    },
)


@settings(max_examples=50, deadline=None)
@given(tree=TREES)
def test_a_resolved_configuration_loads_to_itself_exactly(tree: dict[str, Any]) -> None:
    config = load(tree)
    written = resolved(config)
    assert load(written) == config
    assert load(explicit(written)) == config
    assert load(written).tree() == written


@settings(max_examples=30, deadline=None)
@given(tree=TREES, method=st.sampled_from(sorted(METHODS)), epochs=st.integers(1, 400))
def test_an_override_on_a_resolved_file_equals_one_on_what_the_user_had_set(
    tree: dict[str, Any], method: str, epochs: int
) -> None:
    """Writing config.yaml in between freezes no default of the old method into the new one."""
    overrides = {"method": method, "epochs": epochs}
    own_defaults_dropped = explicit(tree)
    assert load(resolved(load(tree)), overrides) == load(own_defaults_dropped, overrides)


@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_a_resolved_file_of_one_method_serves_another(semantics: str) -> None:
    user: dict[str, Any] = {"lr": 0.05, "attack": {"epsilon": "4/255", "num_steps": 7}, "loss": {"beta": 0.5}}
    file = resolved(load({"method": "iad1", "semantics": semantics, **user}))
    assert file["attack"]["bn"] == "train"
    config = load(file, {"method": "trades"})
    assert config == load({"method": "trades", "semantics": semantics, **user})
    assert (config.attack.loss, config.attack.random_start, config.attack.bn) == ("kl", "gaussian", "eval")
    assert (config.lr, config.attack.epsilon, config.attack.num_steps) == (0.05, 4 / 255, 7)
    assert config.loss.warmup == 0
    assert config.attack.clamp_start is False


def test_a_resolved_teacher_of_few_epochs_gets_the_milestones_of_many() -> None:
    file = resolved(load({"method": "at", "semantics": "official", "epochs": 100}))
    assert file["optim"]["milestones"] == [0.29, 0.59]
    assert load(file, {"epochs": 200}).optim.milestones == (99 / 200, 149 / 200)


def test_explicit_is_what_differs_from_the_defaults_of_its_own_method() -> None:
    tree = {"method": "trades", "lr": 0.1, "attack": {"bn": "eval", "num_steps": 3}, "loss": {"lam": 0}}
    assert explicit(tree) == {"method": "trades", "attack": {"num_steps": 3}}
    assert explicit({"attack": {"bn": "eval"}}) == {"attack": {"bn": "eval"}}  # iad1's own is "train"
    assert explicit({}) == {}


@pytest.mark.parametrize(
    ("written", "number"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("1/3", 1 / 3), ("2e-4", 2e-4), ("0.03", 0.03), (1, 1.0)],
)
def test_numbers_may_be_written_as_fractions(written: object, number: float) -> None:
    assert load({"attack": {"epsilon": written}}).attack.epsilon == number
    assert validated(AttackSpec, {"step_size": written}).step_size == number


def test_fractions_of_the_run_scale_with_the_epochs_and_whole_numbers_do_not() -> None:
    assert [epochs_of(0.3, epochs) for epochs in (200, 100, 20, 10, 1)] == [60, 30, 6, 3, 0]
    assert [epochs_of(0.75, epochs) for epochs in (200, 100, 20)] == [150, 75, 15]
    assert [epochs_of(99 / 200, 200), epochs_of(149 / 200, 200)] == [99, 149]
    assert [epochs_of(0.5, 5), epochs_of(0.5, 1), epochs_of(0.29, 100)] == [3, 1, 29]
    assert [epochs_of(60, epochs) for epochs in (200, 20)] == [60, 60]
    assert [epochs_of(1, 200), epochs_of(0, 200)] == [1, 0]
    assert load({"loss": {"warmup": "60/200"}}).loss.warmup == 0.3


def test_merge_is_deep_later_wins_and_its_inputs_stay() -> None:
    first = {"loss": {"weights": {"kl_self": 6, "ce_nat": 1}, "tau": 2}, "optim": {"milestones": [0.3, 0.6]}}
    second = {"loss": {"weights": {"kl_self": [1, -1]}}, "optim": {"milestones": [0.5]}, "lr": 1}
    assert merge(first, second) == {
        "loss": {"weights": {"kl_self": [1, -1], "ce_nat": 1}, "tau": 2},
        "optim": {"milestones": [0.5]},
        "lr": 1,
    }
    assert first["loss"] == {"weights": {"kl_self": 6, "ce_nat": 1}, "tau": 2}
    assert merge({"a": 1}, {"a": {"b": 2}}, {"a": {"c": 3}}) == {"a": {"b": 2, "c": 3}}
    assert merge() == {}


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("lr=0.05", {"lr": 0.05}),
        ("attack.epsilon=8/255", {"attack": {"epsilon": "8/255"}}),
        ("loss.weights.kl_self=[1, -1]", {"loss": {"weights": {"kl_self": [1, -1]}}}),
        ("optim.weight_decay=2e-4", {"optim": {"weight_decay": 2e-4}}),
        ("data=/a=b/c", {"data": "/a=b/c"}),
        ("loss.gamma=null", {"loss": {"gamma": None}}),
        (" amp = true", {"amp": True}),
        ("out=", {"out": None}),
    ],
)
def test_assignments(text: str, tree: dict[str, Any]) -> None:
    assert parse_assignment(text) == tree
    load(tree)


@pytest.mark.parametrize(
    "text", ["lr", "", "=3", " =3", "lr=[1", "lr=&a [*a]", "lr=!!python/object:os.system x", "lr=a: b: c"]
)
def test_assignments_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\A--set[^\n]*\Z") as error:
        parse_assignment(text)
    key, _, value = text.partition("=")
    assert repr(value) in str(error.value) or repr(text) in str(error.value)
    assert key in str(error.value)


def test_a_file_is_read_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# a comment\nmethod: ard\nattack:\n  epsilon: 8/255\n", encoding="utf-8")
    assert read_file(path) == {"method": "ard", "attack": {"epsilon": "8/255"}}
    path.write_text("# nothing but a comment\n", encoding="utf-8")
    assert read_file(path) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1\nb: 2\n", "not valid YAML: line 2"),
        (b"a: 1\nb: 2\na: 3\n", "not valid YAML: line 3: the key 'a' is there twice"),
        (b"!!python/object/apply:os.system ['true']\n", "not valid YAML: line 1"),
        (b"- a\n- b\n", "holds list"),
        (b"3\n", "holds int"),
        (b"1: a\n", "`key: value`"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\A--config: [^\n]+\Z") as error:
        read_file(path, "--config")
    assert str(path) in str(error.value)
    assert says in str(error.value)
    with pytest.raises(ValueError, match=rf"\A{re.escape(str(path))} [^\n]+\Z"):
        read_file(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=rf"\A--config: cannot read [^\n]*{reason}[^\n]*\Z") as error:
            read_file(path, "--config")
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("tree", "key", "tail"),
    [
        ({"metod": "at"}, "'metod'", "did you mean 'method'? known: amp, "),
        ({"los": {"tau": 1}}, "'los'", "did you mean 'loss'?"),
        ({"loss": {"taus": 1}}, "'loss.taus'", "did you mean 'tau'? known: balance_floor, balance_rate, beta, "),
        ({"attack": {"num_step": 1}}, "'attack.num_step'", "did you mean 'num_steps'?"),
        ({"eval": {"atack": "x"}}, "'eval.atack'", "did you mean 'attack'?"),
        ({"loss": {"weights": {"klself": 1}}}, "'loss.weights.klself'", "did you mean 'kl_self'? known: ce_adv"),
        ({"zzz": 1}, "'zzz'", "; known: amp"),
        ({1: 2}, "'1'", "; known: amp"),
    ],
)
def test_an_unknown_key_names_the_nearest(tree: dict[str, Any], key: str, tail: str) -> None:
    for given_, override in ((tree, {}), ({}, tree)):
        with pytest.raises(ValueError, match=r"\Aunknown key [^\n]+\Z") as error:
            load(given_, override)
        assert key in str(error.value)
        assert tail in str(error.value)


def test_nearest_lists_all_that_is_known() -> None:
    assert nearest("iad", ["trades", "iad1"]) == "did you mean 'iad1'? known: iad1, trades"
    assert nearest("?", ["b", "a"]) == "known: a, b"


BAD_VALUES: list[tuple[str, object]] = [
    ("semantics", "publishd"),
    ("semantics", ["paper"]),
    ("method", None),
    ("method", ["at"]),
    ("model", 18),
    ("normalize", "maybe"),
    ("limit_train", 0),
    ("validation", 1),
    ("validation", -0.1),
    ("epochs", 0),
    ("epochs", "ten"),
    ("epochs", 1.5),
    ("epochs", True),
    ("batch_size", "1/2"),
    ("lr", 0),
    ("lr", "1/0"),
    ("lr", "a/b"),
    ("lr", "9" * 400 + "/1"),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", True),
    ("lr", {"start": 0.1}),
    ("lr", datetime.date(2024, 1, 1)),
    ("dtype", "float16"),
    ("micro_batch", 0),
    ("micro_batch", "many"),
    ("sync_bn", "maybe"),
    ("lr_scale", "sqrt"),
    ("averaging.kind", "mean"),
    ("averaging.decay", 1),
    ("awp.gamma", -0.1),
    ("optim.schedule", "cubic"),
    ("optim.clip_norm", 0),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", "one\ntwo"),
    ("log_every", 0),
    ("attack", "pgd10"),
    ("attack", None),
    ("attack.threat_model", "L1"),
    ("attack.epsilon", -1),
    ("attack.num_steps", 2.5),
    ("attack.random_start", "normal"),
    ("attack.clamp_start", "?"),
    ("attack.bn", "frozen"),
    ("loss.tau", 0),
    ("loss.lam", 1.5),
    ("loss.beta", -0.1),
    ("loss.gamma", "1-alpha"),
    ("loss.warmup", 1.5),
    ("loss.warmup", -1),
    ("loss.label_smoothing", 1),
    ("loss.weights", 3),
    ("loss.weights.kl_self", "six"),
    ("loss.weights.kl_self", [1, 2, 3]),
    ("loss.weights.kl_self", math.nan),
    ("forwards.clean", "yes"),
    ("optim.momentum", 1),
    ("optim.milestones", 0.5),
    ("optim.milestones", [0.75, 0.5]),
    ("optim.milestones.1", -0.5),
    ("optim.lr_factors.0", "tenth"),
    ("teacher.epochs", 0),
    ("teacher_st.lr", 0),
    ("eval.final", "natural"),
    ("eval.batch_size", 0),
]


def nested(path: str, value: object) -> dict[str, Any]:
    """The tree whose only leaf is `path`; a last part that is a digit stands for a place in a list of two."""
    *groups, last = path.split(".")
    tree: Any = [0.5] * int(last) + [value] + [0.5] * (1 - int(last)) if last.isdigit() else {last: value}
    for group in reversed(groups):
        tree = {group: tree}
    return dict(tree)


@pytest.mark.parametrize("base", [{}, {"method": "at", "semantics": "official"}], ids=["iad1", "official-at"])
@pytest.mark.parametrize(("path", "value"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_key_in_one_line(path: str, value: object, base: dict[str, Any]) -> None:
    for trees in ((merge(base, nested(path, value)),), (base, nested(path, value))):
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
            load(*trees)
        assert path in str(error.value)
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"optim": {"milestones": [0.5]}}, ["optim.milestones", "optim.lr_factors", "1 and 2"]),
        ({"semantics": "official", "loss": {"tau_self": 2}}, ["loss.tau_self", "official", "2"]),
        ({"semantics": "official", "loss": {"gamma": 0.5}}, ["loss.gamma", "paper", "0.5"]),
        ({"dtype": "float64", "amp": True}, ["amp", "dtype=float64"]),
        ({"epochs": 10, "optim": {"milestones": [8, 0.5]}}, ["optim.milestones", "[8.0, 0.5]"]),
        ({"augment": False, "augmentation": "colour-jitter"}, ["augmentation: colour-jitter", "augment is false"]),
        ({"augmentation": "colour-jitter,random-resized-crop"}, ["augmentation: random-resized-crop comes first"]),
        ({"augmentation": ["colour-jitter"] * 2}, ["augmentation: each name", "got colour-jitter, colour-jitter"]),
    ],
)
def test_values_that_exclude_each_other(tree: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load(tree)
    assert [name for name in names if name not in str(error.value)] == []


def test_augmentation_is_a_list_or_words_with_commas() -> None:
    names = ("random-resized-crop", "trivial-augment")
    for given_ in (",".join(names), ", ".join(names), list(names)):
        assert load({"augmentation": given_}).augmentation == names
    assert load({"augmentation": ""}).augmentation == load({}).augmentation == ()
    with pytest.raises(ValueError, match=r"\Aaugmentation\.1: [^\n]*'trivial-augment'[^\n]*, got 'trivial'\Z"):
        load({"augmentation": "random-resized-crop,trivial"})


def test_whole_numbers_in_texts_are_numbers_also_where_a_default_depends_on_them() -> None:
    config = load({"method": "at", "semantics": "official", "epochs": "100"})
    assert config.epochs == 100
    assert config.optim.milestones == (0.29, 0.59)


def test_a_configuration_is_frozen() -> None:
    config = load({})
    for section, key, value in ((config, "lr", 1.0), (config.loss, "tau", 2.0), (config.attack, "bn", "eval")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, value)
    assert load({}) == config


def test_two_configurations_share_no_weights() -> None:
    one, other = LossConfig(), LossConfig()
    one.weights["kl_self"] = 6.0
    assert other.weights == {}
    assert load({}).loss.weights == {}


# ---------------------------------------------------------------- what is known of every key


def test_something_is_known_of_every_key() -> None:
    """Every leaf of the configuration is among KEYS, once, and nothing else is."""

    def leaves(tree: Any, prefix: str = "") -> list[str]:
        if not isinstance(tree, config.Section):
            return [prefix]
        return [
            name
            for key in type(tree).model_fields
            for name in leaves(getattr(tree, key), f"{prefix}.{key}" if prefix else key)
        ]

    assert sorted(config.KEYS) == sorted(leaves(load({})))


def test_a_key_of_which_nothing_is_known_is_no_key() -> None:
    class Forgetful(config.Section):
        told: Annotated[int, config.own("a number")] = 1
        forgotten: int = 2

    with pytest.raises(ValueError, match=r"^Forgetful\.forgotten: annotate it with one Key$"):
        dict(config.collect(Forgetful))


def test_null_needs_a_meaning() -> None:
    class Vague(config.Section):
        length: Annotated[int | None, config.own("a number")] = None

    with pytest.raises(ValueError, match=r"^Vague\.length: say in its Key what null means$"):
        dict(config.collect(Vague))


def test_a_key_needs_a_text_and_a_flag_a_group() -> None:
    with pytest.raises(ValueError, match="needs a text"):
        config.Key("")
    with pytest.raises(ValueError, match="--fast"):
        config.Key("how fast", flag="--fast")
    with pytest.raises(ValueError, match="speed"):
        config.Key("how fast", group="speed")


def test_what_is_known_fits_together() -> None:
    for name, key in config.KEYS.items():
        # What a run may go on with must not make another teacher of the same name; `resuming` keeps the epochs'.
        assert not key.decides or key.resume in ("fixed", "longer"), name
        assert not key.later or key.decides, name


def test_parts_of_a_tree_by_what_is_known() -> None:
    tree = {"method": "at", "lr": 0.2, "attack": {"bn": "eval", "num_steps": 3}, "loss": {"weights": {}}}
    assert config.part(tree, lambda key: key.teacher) == {"lr": 0.2, "attack": {"num_steps": 3}}
    assert config.part(tree, lambda key: key.decides) == tree
    assert config.part({"out": "x", "workers": 3, "eval": {"final": []}}, lambda key: key.decides) == {}
    assert config.flat(tree) == {
        "method": "at", "lr": 0.2, "attack.bn": "eval", "attack.num_steps": 3, "loss.weights": {},
    }  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(before=TREES, after=TREES)
def test_changes_make_of_one_configuration_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    one, other = load(before), load(after)
    changes = config.changes(one, other)
    tree = one.tree()
    tree["loss"]["weights"] = {}  # what is merged into it stays
    assert config.checked(merge(tree, {"loss": {"weights": other.tree()["loss"]["weights"]}}, changes)) == other
    words = config.assignments(changes)
    assert words[::2] == ["--set"] * (len(words) // 2)
    assert merge(*map(parse_assignment, words[1::2])) == changes


@pytest.mark.parametrize("key", ["epsilon", "step_size"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (8, "; 8/255 may be meant, got 8"),
        ("8", "; 8/255 may be meant, got '8'"),
        ("2040/255", "; 8/255 may be meant"),
        (1.0000001, "an L-inf length is at most 1"),
        (1000, "since images are in [0, 1], got 1000"),
        (-0.1, "greater than or equal to 0"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
    ],
)
def test_lengths_in_other_units_are_refused(key: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"\Aattack\.{key}: [^\n]*\Z") as error:
        load({"attack": {key: value}})
    assert words in str(error.value)
    with pytest.raises(ValueError, match=key):
        config.validated(AttackSpec, {key: value})


def test_lengths_in_these_units_are_taken() -> None:
    assert load({"attack": {"epsilon": "8/255", "step_size": 1}}).attack.epsilon == 8 / 255
    assert load({"attack": {"threat_model": "L2", "epsilon": 8, "step_size": 2}}).attack.epsilon == 8


@pytest.mark.parametrize("section", ["teacher", "teacher_st"])
@pytest.mark.parametrize(("key", "value"), [("weights", "ema"), ("normalize", "cifar10")])
def test_what_is_of_a_checkpoint_needs_one(section: str, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{section}\.{key}: [^\n]*{section}\.checkpoint names none\Z"):
        load({section: {key: value}})
    assert getattr(getattr(load({section: {key: value, "checkpoint": "a.pt"}}), section), key) == value


def test_a_run_directory_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "some.pt"
    for place, path in ((tmp_path, tmp_path / "best.pt"), (file, file)):
        teacher = {"checkpoint": str(place)}
        keys = {"init": str(place), "extra_labels": str(place), "teacher": teacher, "teacher_st": teacher}
        found = config.with_absolute_paths(config.load({"extra_data": "x.npz", **keys}))
        teachers = (found.teacher.checkpoint, found.teacher_st.checkpoint)
        assert {found.init, found.extra_labels, *teachers} == {str(path)}


def test_the_tables_of_keys_are_those_of_the_configuration() -> None:
    page = key_tables.PAGE.read_text(encoding="utf-8")
    assert key_tables.written(page) == page, "run python -m tests.key_tables"
    assert all(page.count(f"\n| `{name}` |") == 1 for name in config.KEYS)
