"""Training step of each method as a textbook writes it: plain eager torch, and no op of this project.

The oracle that the engine's step is tested against, and a baseline that it is timed against. Networks, images
and labels are given; a step changes the student's parameters, its running statistics and the optimizer's momentum.

Names: x natural, a adversarial, m mirrored images 2 x - a; s student, t robust, n standard teacher; logits (B, C).
"""

from bench.lib.steps.textbook.attacks import AttackNumbers
from bench.lib.steps.textbook.parts import Balance, StepParts, StepSetting, plain
from bench.lib.steps.textbook.step import TextbookStep

__all__ = ["AttackNumbers", "Balance", "StepParts", "StepSetting", "TextbookStep", "plain"]
