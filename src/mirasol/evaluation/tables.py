"""Which numbers stand in the table of each data set, as its papers print them, and how its answers are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

from mirasol.data.datasets.activitynet_qa import FREE


@dataclass(frozen=True)
class Row:
    """One number: the mean over the questions of these types, over all of them where `types` is None."""

    name: str
    types: tuple[str, ...] | None = None

    def holds(self, kind: str) -> bool:
        """Whether a question of this type counts in the row."""
        return self.types is None or kind in self.types


def _each(*types: str) -> tuple[Row, ...]:
    return tuple(Row(kind, (kind,)) for kind in types)


# Xu et al. 2017: by first word.
_MSRVTT = (*_each("what", "who", "how", "when", "where"), Row("All"))
# Yu et al. 2019: three types, Free, All, and Free by kind of answer.
_ACTIVITYNET = (
    *_each("Motion", "Spatial relationship", "Temporal relationship"),
    Row("Free", FREE),
    Row("All"),
    *_each(*FREE),
)
# Xiao et al. 2021; questions about what came before and what comes next are one column.
_NEXT_MC = (
    Row("Why", ("CW",)),
    Row("How", ("CH",)),
    Row("Acc_C", ("CW", "CH")),
    Row("Bef&Aft", ("TN", "TP")),
    Row("When", ("TC",)),
    Row("Acc_T", ("TN", "TP", "TC")),
    Row("Cnt", ("DC",)),
    Row("Loc", ("DL",)),
    Row("Other", ("DO",)),
    Row("Acc_D", ("DB", "DC", "DL", "DO")),
    Row("Acc"),
)
_NEXT_OE = (
    *_each("CW", "CH"),
    Row("C", ("CW", "CH")),
    Row("TN", ("TN", "TP")),
    *_each("TC"),
    Row("T", ("TN", "TP", "TC")),
    *_each("DB", "DC", "DL", "DO"),
    Row("D", ("DB", "DC", "DL", "DO")),
    Row("All"),
)
_TABLES = {
    "msrvtt_qa": _MSRVTT,
    "activitynet_qa": _ACTIVITYNET,
    "nextqa_mc": _NEXT_MC,
    "nextqa_oe": _NEXT_OE,
}


def table_rows(dataset: str, types: Sequence[str]) -> tuple[Row, ...]:
    """The rows of a data set's table. One without a table of its own has a row for each of `types` and one for all."""
    if dataset in _TABLES:
        return _TABLES[dataset]
    own = sorted(set(types) - {"untyped"})
    return (*_each(*own), Row("All"))


def wups_rows(dataset: str, types: Sequence[str]) -> tuple[Row, ...]:
    """The rows of a table of WUPS; NExT-QA's are called as in its papers."""
    if dataset != "nextqa_oe":
        return (*table_rows(dataset, types)[:-1], Row("WUPS"))
    summed = {"C": "WUPS_C", "T": "WUPS_T", "D": "WUPS_D", "All": "WUPS"}
    return tuple(Row(summed.get(row.name, row.name), row.types) for row in _NEXT_OE)


def headline(dataset: str) -> str:
    """The row that stands for the whole data set."""
    return table_rows(dataset, ())[-1].name if dataset != "activitynet_qa" else "All"


def normalisation_of(dataset: str) -> str:
    """Key of `NORMALISATIONS` by which generated answers are compared."""
    return "folded" if dataset == "folder" else "light"
