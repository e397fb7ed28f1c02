"""How the mean reward of the held-out rows is told: as an accuracy only where it is that of one function alone."""

from dataclasses import dataclass

from learner.config import RewardConfig


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Its name, and how a number is written.

    Example: ACCURACY.show(0.925) is "92.5%", REWARD.show(0.925) is "0.925".
    """

    name: str
    form: str

    def show(self, value: float) -> str:
        """The number as text."""
        return format(value, self.form)


ACCURACY = HeldOut("held-out accuracy", ".1%")
REWARD = HeldOut("held-out reward", ".3f")


def held_out_of(config: RewardConfig) -> HeldOut:
    """A weighted sum is no share of right answers."""
    return ACCURACY if len(config.functions) == 1 and config.weights in ((), (1.0,)) else REWARD
