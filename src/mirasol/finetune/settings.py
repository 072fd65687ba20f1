"""The arguments of a fine-tuning. Imports no torch: they are checked at once."""

from dataclasses import dataclass

from mirasol.errors import UserError


@dataclass(frozen=True)
class Settings:
    """The arguments of a fine-tuning.

    data: the user's folder; start: checkpoint to begin with; output: where everything goes
    minutes, epochs: length of the training, one of them at most; overrides: KEY=VALUE of the recipe
    """

    data: str
    start: str
    output: str
    minutes: float | None = None
    epochs: int | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for option, value in (("FOLDER", self.data), ("--from", self.start), ("--output", self.output)):
            if not value.strip():
                raise UserError(f"{option} {value!r}: is empty: give a name (. is the current folder)")
        if self.minutes is not None and self.epochs is not None:
            raise UserError(f"--minutes {self.minutes:g} and --epochs {self.epochs}: give one of them")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UserError(f"--minutes {self.minutes:g}: must be above 0")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"--epochs {self.epochs}: must be at least 1")
