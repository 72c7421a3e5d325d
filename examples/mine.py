"""One of each that a user may register: engine train --import examples/mine.py --method mine --model small ..."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import register


def loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy on x~ and distance to the robust teacher, per sample: (B,)."""
    student, teacher = logits["s_adv"], logits["t_at_nat"]
    distance = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    return 0.3 * F.cross_entropy(student, labels, reduction="none") + 0.7 * distance


class Small(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to logits (B, C)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


def noise() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test part, each images and labels."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return images, torch.arange(count) % 3

    return part(600), part(300)


def signs(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Random corners of the ball around x."""
    return (x + epsilon * torch.randn_like(x).sign()).clamp(0, 1)


def show(row: dict[str, object]) -> None:
    """Log the loss of a row."""
    logging.warning("%s %s: %s", row["event"], row["step"], row["loss"])


register.method(
    "mine", loss=loss, reads=[("student", "x_adv"), ("teacher", "x")], summary="cross-entropy and distance"
)
register.method("softer-ard", terms=lambda p: {"ce_nat": 0.2, "kl_at_nat": (0, 0.8 * p.tau**2)}, base="ard")
register.model("small", Small, summary="one convolution")
register.dataset("noise", noise, class_names=("a", "b", "c"), summary="no pattern at all")
register.attack("signs", signs, summary="random signs")
register.logger("show", show)
