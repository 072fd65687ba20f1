"""The rows of each data set's table, as its papers print them, and how its answers are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

from mirasol.data.datasets.activitynet_qa import FREE


@dataclass(frozen=True)
class TableRow:
    """One number: the mean over the questions of these types, over all of them where `types` is None."""

    name: str
    types: tuple[str, ...] | None = None

    def includes(self, question_type: str) -> bool:
        """Whether questions of this type count in the row."""
        return self.types is None or question_type in self.types


def _make_single_rows(*types: str) -> tuple[TableRow, ...]:
    return tuple(TableRow(name, (name,)) for name in types)


# Xu et al. 2017: by first word.
_MSRVTT = (*_make_single_rows("what", "who", "how", "when", "where"), TableRow("All"))
# Yu et al. 2019: three types, Free, All, and Free by kind of answer.
_ACTIVITYNET = (
    *_make_single_rows("Motion", "Spatial relationship", "Temporal relationship"),
    TableRow("Free", FREE),
    TableRow("All"),
    *_make_single_rows(*FREE),
)
# Xiao et al. 2021; questions about what came before and what comes next are one column.
_NEXT_MC = (
    TableRow("Why", ("CW",)),
    TableRow("How", ("CH",)),
    TableRow("Acc_C", ("CW", "CH")),
    TableRow("Bef&Aft", ("TN", "TP")),
    TableRow("When", ("TC",)),
    TableRow("Acc_T", ("TN", "TP", "TC")),
    TableRow("Cnt", ("DC",)),
    TableRow("Loc", ("DL",)),
    TableRow("Other", ("DO",)),
    TableRow("Acc_D", ("DB", "DC", "DL", "DO")),
    TableRow("Acc"),
)
_NEXT_OE = (
    *_make_single_rows("CW", "CH"),
    TableRow("C", ("CW", "CH")),
    TableRow("TN", ("TN", "TP")),
    *_make_single_rows("TC"),
    TableRow("T", ("TN", "TP", "TC")),
    *_make_single_rows("DB", "DC", "DL", "DO"),
    TableRow("D", ("DB", "DC", "DL", "DO")),
    TableRow("All"),
)
_TABLES = {
    "msrvtt_qa": _MSRVTT,
    "activitynet_qa": _ACTIVITYNET,
    "nextqa_mc": _NEXT_MC,
    "nextqa_oe": _NEXT_OE,
}


def find_table_rows(dataset: str, types: Sequence[str]) -> tuple[TableRow, ...]:
    """The rows of a data set's table; without a table of its own, a row for each of `types` and one for all."""
    if dataset in _TABLES:
        return _TABLES[dataset]
    own = sorted(set(types) - {"untyped"})
    return (*_make_single_rows(*own), TableRow("All"))


def find_wups_rows(dataset: str, types: Sequence[str]) -> tuple[TableRow, ...]:
    """The rows of a table of WUPS; NExT-QA's are named as in its papers."""
    if dataset != "nextqa_oe":
        return (*find_table_rows(dataset, types)[:-1], TableRow("WUPS"))
    summed = {"C": "WUPS_C", "T": "WUPS_T", "D": "WUPS_D", "All": "WUPS"}
    return tuple(TableRow(summed.get(row.name, row.name), row.types) for row in _NEXT_OE)


def find_headline(dataset: str) -> str:
    """Name of the row that represents the data set."""
    return find_table_rows(dataset, ())[-1].name if dataset != "activitynet_qa" else "All"


def find_normalisation(dataset: str) -> str:
    """Key of `NORMALISATIONS` by which generated answers are compared."""
    return "folded" if dataset == "folder" else "light"
