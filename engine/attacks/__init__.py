"""Attacks on images: PGD, AutoAttack, frozen copies to attack, checks for masked gradients."""
