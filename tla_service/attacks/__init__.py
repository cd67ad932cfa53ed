"""Adversaries: functions of a network's logits, images and labels."""

from tla_service.attacks.gradient import (
    UNBROKEN,
    Attack,
    LogitsFn,
    attack_images,
    climb,
    craft,
    craft_freely,
    craft_noisy_step,
    is_right,
    starting_point,
)

__all__ = [
    "UNBROKEN", "Attack", "LogitsFn", "attack_images", "climb", "craft", "craft_freely", "craft_noisy_step",
    "is_right", "starting_point",
]  # fmt: skip
