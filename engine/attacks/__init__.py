"""Attacks on images: PGD, AutoAttack, frozen copies to attack, and whether gradients are masked."""
