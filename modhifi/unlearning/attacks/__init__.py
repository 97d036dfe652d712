"""What is tried to get a forgotten class back: every attack is one file of this package."""

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure, measures

__all__ = ["ATTACKS", "Attack", "Attacked", "Measure", "attack", "measures"]

ATTACKS.discover(__name__)


def attack(target: Attacked) -> dict[str, float | None]:
    """What every attack finds, by the key of its measure; None was not measured."""
    return {key: value for entry in ATTACKS.values() for key, value in entry.run(target).items()}
