"""The report on every tensor: loaded, filled, left at random, or unused in its source."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PretrainedReport:
    """Where the weights of a model come from.

    loaded: our name, the source's names and file, the shape, how the tensor was transformed, and where the source has
    only the first rows, `untrained_from`, the first of the others. filled: tensors set to a number because the source
    has none. random: tensors initialised at random. unused: tensors of the sources that are not used, with the reason.
    config_changes: fields that differ from the preset because a source needs it, as [old, new]. remarks: assumptions
    about what a source does not state. sources: by option, the path or the repository with its commit.
    """

    loaded: list[dict[str, Any]] = field(default_factory=list)
    filled: list[dict[str, Any]] = field(default_factory=list)
    random: list[dict[str, Any]] = field(default_factory=list)
    unused: list[dict[str, Any]] = field(default_factory=list)
    config_changes: dict[str, list[Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A summary for the screen: sources, changed fields, counts, reasons for unused tensors, remarks."""
        lines = [f"{option}: {name}" for option, name in self.sources.items()]
        lines += [f"config: {name} = {new} (was {old})" for name, (old, new) in self.config_changes.items()]
        lines.append(
            f"loaded {len(self.loaded)} tensors ({_count_weights(self.loaded)} weights), set {len(self.filled)}, "
            f"left at random {len(self.random)} ({_count_weights(self.random)} weights), "
            f"unused in the source {len(self.unused)}"
        )
        reasons: dict[str, list[str]] = {}
        for entry in self.unused:
            reasons.setdefault(entry["reason"], []).append(entry["source"])
        lines += [
            f"unused: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}"
            for why, names in reasons.items()
        ]
        return lines + [f"note: {remark}" for remark in self.remarks]


def _count_weights(entries: list[dict[str, Any]]) -> str:
    total = 0
    for entry in entries:
        size = 1
        for axis in entry["shape"]:
            size *= axis
        total += size
    return f"{total / 1e6:.1f}M" if total >= 1e5 else f"{total:,}"
