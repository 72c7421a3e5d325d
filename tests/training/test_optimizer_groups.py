"""AdamW, groups of parameters and layer-wise decay, against torch, timm, and steps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import config, methods, models
from engine.config import RunConfig
from engine.pipelines.base import Batch
from engine.system.precision import Precision
from engine.training.learner import Learner
from engine.training.weights import optimizer

CPU = Precision(torch.device("cpu"), torch.float32)


def run_of(**keys: Any) -> RunConfig:
    return config.load({"method": "st", "model": "resnet8", "device": "cpu"}, keys)


def network_of(seed: int = 0, num_classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("resnet8", num_classes)


def batches(count: int, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, size, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (count, size), generator=generator)
    return [Batch(x, y, torch.arange(size)) for x, y in zip(images, labels, strict=True)]


def learner_of(complete: RunConfig, network: nn.Module | None = None) -> Learner:
    return Learner((network or network_of()).train(), {}, methods.get("st"), complete, CPU)


def learned(learner: Learner, steps: list[Batch], lr: float) -> dict[str, Tensor]:
    for number, batch in enumerate(steps):
        learner.learn(batch, learner.method, lr * (1 - number / 20))
    return {name: value.clone() for name, value in learner.student.state_dict().items()}


# ---------------------------------------------------------------- AdamW


def test_adamw_is_torchs_with_groups_made_by_hand() -> None:
    """Ten steps, bit for bit: matrices decay, norms and biases do not."""
    keys = {"implementation": "adamw", "betas": (0.85, 0.98), "eps": 1e-7, "weight_decay": 0.1}
    own, network = network_of(), network_of()
    built = optimizer.build(own, run_of(optim=keys))
    matrices = [weight for weight in network.parameters() if weight.dim() > 1]
    vectors = [weight for weight in network.parameters() if weight.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.85, 0.98),
        eps=1e-7,
        fused=True,
    )
    for number in range(10):
        lr = 3e-3 * (1 - number / 20)
        for group in (*built.param_groups, *adamw.param_groups):
            group["lr"] = lr
        for one, other in zip(own.parameters(), network.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        built.step()
        adamw.step()
    for name, value in network.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    assert not torch.equal(own.state_dict()["bn1.weight"], network_of().state_dict()["bn1.weight"])


def test_adamw_is_the_formula_in_float64() -> None:
    """Loshchilov and Hutter (2019), Algorithm 2."""
    torch.manual_seed(0)
    network = nn.Linear(5, 4, dtype=torch.float64)
    optim = {"implementation": "adamw", "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    adamw = optimizer.build(network, run_of(lr=0.1, optim=optim))
    expected = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step in range(1, 6):
        for name, weight in network.named_parameters():
            gradient = torch.randn_like(weight)
            weight.grad = gradient.clone()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
            decay = 0.2 if name == "weight" else 0.0
            expected[name] = expected[name] * (1 - 0.1 * decay) - 0.1 * mean / (square.sqrt() + 1e-3)
        adamw.step()
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_sgd_has_one_group_that_decays_everything() -> None:
    """As published, and in the order of the network: state dicts count parameters so."""
    network = network_of()
    (group,) = optimizer.build(network, run_of(optim={"weight_decay": 0.3})).param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in network.parameters()]
    assert (group["lr"], group["lr_scale"], group["weight_decay"]) == (0.1, 1.0, 0.3)


@pytest.mark.parametrize(
    ("optim", "decayed_vectors"),
    [
        ({}, True),
        ({"decay_norms_and_biases": False}, False),
        ({"implementation": "adamw"}, False),
        ({"implementation": "adamw", "decay_norms_and_biases": True}, True),
    ],
)
def test_decay_of_norms_and_biases_is_a_choice(optim: dict[str, Any], decayed_vectors: bool) -> None:
    made = optimizer.build(network_of(), run_of(optim=optim | {"weight_decay": 0.3}))
    decays = {
        (weight.dim() > 1, group["weight_decay"]) for group in made.param_groups for weight in group["params"]
    }
    assert decays == {(True, 0.3), (False, 0.3 if decayed_vectors else 0.0)}


class Parts(nn.Module):
    """One of each kind of parameter, by whether weight decay is usual for it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 7, 6))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.layer_scale = nn.Parameter(torch.ones(6, 1, 1))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.projection = nn.Parameter(torch.zeros(6, 5))
        self.words = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm((4, 6))
        self.conv = nn.Conv2d(3, 1, 3)
        self.conv1d = nn.Conv1d(1, 1, 3)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 1)


def test_what_is_not_decayed() -> None:
    names = {name for name, _ in Parts().named_parameters()}
    decayed = {
        "projection", "conv.weight", "conv1d.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "head.weight",
    }  # fmt: skip
    assert names - set(optimizer.undecayed(Parts())) == decayed


# ---------------------------------------------------------------- layer-wise decay


@pytest.mark.parametrize(
    "name",
    ["resnet50", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "mobilenetv2_050"],
)
def test_groups_of_a_network_of_timm_are_timms(name: str) -> None:
    """Factor of the rate and weight decay of every parameter, as timm's own function gives them."""
    timm, theirs = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=7)
    optim = {"implementation": "adamw", "layer_decay": 0.7, "weight_decay": 0.04}
    found = factors(nn.ModuleDict({"network": network}), run_of(lr=0.5, optim=optim))
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    by_id = {id(weight): name for name, weight in network.named_parameters()}
    expected = {
        f"network.{by_id[id(weight)]}": (group["lr_scale"], group["weight_decay"])
        for group in theirs.param_groups_layer_decay(network, 0.04, spared, layer_decay=0.7)
        for weight in group["params"]
    }
    assert found.keys() == expected.keys()
    for parameter, numbers in expected.items():
        assert found[parameter] == pytest.approx(numbers, rel=1e-12), parameter


def factors(network: nn.Module, complete: RunConfig) -> dict[str, tuple[float, float]]:
    by_id = {id(weight): name for name, weight in network.named_parameters()}
    made = optimizer.groups(network, complete)
    return {by_id[id(w)]: (group["lr_scale"], group["weight_decay"]) for group in made for w in group["params"]}


def test_layers_of_our_resnet50_are_those_of_timms() -> None:
    """By the same names: the stem, 16 blocks and the head."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        own, theirs = models.build("resnet50", 10), timm.create_model("resnet50", num_classes=10)
    complete = run_of(optim={"layer_decay": 0.6})
    found = factors(own, complete)
    assert found == factors(theirs, complete)
    assert found["conv1.weight"][0] == found["bn1.bias"][0] == 0.6**17
    assert found["layer1.0.conv1.weight"][0] == 0.6**16
    assert found["layer4.2.bn3.weight"][0] == 0.6
    assert found["fc.bias"][0] == 1


def test_layers_of_a_transformer_without_timm() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        network = torchvision.models.vit_b_16(num_classes=5)
    found = factors(network, run_of(optim={"layer_decay": 0.5}))
    assert found["class_token"][0] == found["encoder.pos_embedding"][0] == found["conv_proj.weight"][0] == 0.5**13
    for layer in range(12):
        assert found[f"encoder.layers.encoder_layer_{layer}.mlp.0.weight"][0] == 0.5 ** (12 - layer)
    assert found["encoder.ln.weight"][0] == 0.5
    assert found["heads.head.weight"][0] == 1


def test_a_step_moves_each_layer_by_its_part_of_the_rate() -> None:
    """SGD without momentum: the update is lr * factor * gradient, and the factor-1 run tells the gradient."""
    plain = {"momentum": 0, "weight_decay": 0}
    (batch,) = batches(1)
    before = network_of().state_dict()
    moved = []
    for layer_decay in (1.0, 0.5):
        learner = learner_of(run_of(dtype="float64", optim=plain | {"layer_decay": layer_decay}))
        after = learned(learner, [batch], lr=0.2)
        moved.append({name: after[name] - before[name] for name, _ in learner.student.named_parameters()})
        assert learner.numbers.rates[-1] == 0.2
    layer = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "linear": 4}
    for name, whole in moved[0].items():
        factor = 0.5 ** (4 - layer[name.partition(".")[0]])
        assert whole.abs().max() > 0
        torch.testing.assert_close(moved[1][name], factor * whole, rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------- with what surrounds it

ADAMW = {"implementation": "adamw", "layer_decay": 0.6}


@pytest.mark.parametrize(
    "keys",
    [
        {"optim": ADAMW | {"clip_norm": 0.5}},
        {"optim": ADAMW, "awp": {"gamma": 0.01}},
        {"optim": ADAMW | {"clip_norm": 0.5}, "micro_batch": 2},
        {"optim": {"layer_decay": 0.6, "decay_norms_and_biases": False}},
    ],
    ids=["clipped", "weights attacked", "micro-batches", "SGD"],
)
def test_a_learner_goes_on_from_its_state(keys: dict[str, Any]) -> None:
    """Bit for bit, each group at its own rate."""
    complete, steps = run_of(**keys), batches(6)
    whole = learned(learner_of(complete), steps, lr=1e-2)
    first = learner_of(complete)
    for number, batch in enumerate(steps[:3]):
        first.learn(batch, first.method, 1e-2 * (1 - number / 20))
    state, weights = first.state_dict(), first.student.state_dict()
    rates = [group["lr"] for group in first.optimizer.param_groups]
    assert len(set(rates)) == 5
    second = learner_of(complete, network_of(seed=9))
    second.student.load_state_dict(weights)
    second.load_state_dict(state)
    assert [group["lr"] for group in second.optimizer.param_groups] == rates
    for number, batch in enumerate(steps[3:], 3):
        second.learn(batch, second.method, 1e-2 * (1 - number / 20))
    for name, value in second.student.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_norm_of_all_groups_together_is_clipped() -> None:
    """The gradient that AdamW averages in its first step has the largest norm that is allowed."""
    learner = learner_of(run_of(optim=ADAMW | {"clip_norm": 1e-3}))
    learned(learner, batches(1), lr=1e-3)
    squares = [state["exp_avg"].double().square().sum() for state in learner.optimizer.state.values()]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_a_loss_scale_changes_nothing_and_what_overflows_is_skipped() -> None:
    """A power of two is exact; of an infinite gradient no group takes a step."""
    steps = batches(3)
    plain = learned(learner_of(run_of(optim=ADAMW)), steps, lr=1e-2)
    learner = learner_of(run_of(optim=ADAMW))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    learner.scaler = scaler
    object.__setattr__(learner.step, "scaler", scaler)
    scaled = learned(learner, steps, lr=1e-2)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-5, atol=1e-6)
    scaler.update(2.0**126)
    learner.learn(Batch(1e4 * steps[0].x_nat, steps[0].labels, steps[0].sample), learner.method, 1e-2)
    assert scaler.get_scale() < 2.0**126
    for name, weight in learner.student.named_parameters():
        assert torch.equal(weight, scaled[name]), name


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optim": {"implementation": "adamw", "momentum": 0.8}}, "optim.momentum: it is of torch, and"),
        ({"optim": {"implementation": "adamw", "nesterov": True}}, "optim.nesterov: it is of torch, and"),
        ({"optim": {"betas": [0.9, 0.98]}}, "optim.betas: it is of adamw, and optim.implementation is 'torch'"),
        ({"optim": {"implementation": "apex", "eps": 1e-6}}, "optim.eps: it is of adamw"),
        ({"optim": {"implementation": "adamw", "betas": [0.9, 1]}}, "optim.betas"),
        ({"optim": {"implementation": "adam"}}, "'torch', 'apex' or 'adamw'"),
        ({"optim": {"layer_decay": 0}}, "optim.layer_decay"),
        ({"optim": {"layer_decay": 1.1}}, "optim.layer_decay"),
    ],
)
def test_a_key_that_the_optimizer_does_not_read_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        run_of(**keys)
    assert "\n" not in str(refusal.value)


def test_adamw_has_usual_numbers_of_its_own() -> None:
    """Those of SGD would ruin the weights; what a user gives wins, and survives the file of a run."""
    adamw = run_of(optim={"implementation": "adamw"})
    assert (adamw.lr, adamw.optim.weight_decay) == (1e-3, 0.05)
    given = run_of(lr=0.1, optim={"implementation": "adamw", "weight_decay": 2e-4})
    assert (given.lr, given.optim.weight_decay) == (0.1, 2e-4)
    for complete in (adamw, given):
        assert config.load(complete.tree()) == complete
    back = config.load(adamw.tree(), {"optim": {"implementation": "torch"}})
    assert (back.lr, back.optim.weight_decay) == (0.1, 2e-4)
    assert config.load({"method": "n-fgsm", "optim": {"implementation": "adamw"}}).lr == 1e-3
