"""A suite: which runs a table is made of, read from YAML (docs/ablations.md)."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args

from mirasol.config.checks import check_fields, merge_mappings, suggest_nearest_name
from mirasol.config.presets import check_preset
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import override_recipe, read_yaml, recipe_from_dict
from mirasol.errors import UserError
from mirasol.synthetic.synthesize import KINDS

OPEN, CANDIDATES = "open", "candidates"
EXPECTED = ("better", "worse", "same")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_SET_BY_SUITES = {"seed", "output"}  # keys of a recipe
_HIDDEN = ("extends",)  # keys that reading resolves


@dataclass(frozen=True)
class Metric:
    """What is compared: the share of right answers.

    split: of the base recipe's data set; protocol: `open` generation, or `candidates`
    question_types: those that count; null: all
    """

    split: str = "test"
    protocol: Literal["open", "candidates"] = OPEN
    question_types: list[str] | None = None


@dataclass(frozen=True)
class Streaming:
    """How trained rows are also shown clips chunk by chunk, as a camera would: a clip's questions are asked at its end.

    clips: so many clips of the metric's split, each a stream of its own
    chunks: instead of that, one stream of so many chunks, for which clips follow each other, again and again
    window: of the stream, in chunks; `clip`: as many as the clips have; null: none but the row's own
    """

    clips: int | None = None
    chunks: int | None = None
    window: int | str | None = None


@dataclass(frozen=True)
class Pretraining:
    """A run that rows start from. It is made once, whatever the seed of the row.

    recipe: its file, relative to the suite's; overrides: of that recipe, in its own nested form
    after: the pretraining that this one starts from
    """

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A data set that is rendered where `root` does not exist yet, by `mirasol data synthesize` with these settings."""

    root: str
    kind: str = "questions"
    seed: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table: the base recipe with `overrides`, trained once for every seed.

    label: what tables say; null: the name
    paper: the paper's number, in percent
    expected: where the paper has this row compared with `against` (null: the suite's reference): better, worse, or the
        same up to the suite's `margin`; null: no claim
    pretraining: name of the one that the row starts from; null: the base recipe's own `model`
    control: the row is asked under this control (docs/evaluation.md), e.g. no_audio
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    paper: float | None = None
    expected: str | None = None
    against: str | None = None
    pretraining: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class Suite:
    """Everything that determines the runs of a table.

    name: the file's; about: what the page says above the table; base: the recipe as plain data, which rows override
    seeds: of the rows' runs; margin: largest difference that counts as the same
    preset: what a dry run counts in place of a checkpoint that does not exist yet
    """

    name: str
    title: str
    about: str
    base: dict[str, Any]
    rows: dict[str, Row]
    reference: str
    seeds: tuple[int, ...]
    metric: Metric = field(default_factory=Metric)
    pretraining: dict[str, Pretraining] = field(default_factory=dict)
    render: dict[str, Rendered] = field(default_factory=dict)
    margin: float = 0.02
    preset: str | None = None
    stream: Streaming | None = None
    folder: str = "."

    def describe_asking(self, row: str) -> dict[str, Any]:
        """How a row's runs are evaluated, as plain data that identities have."""
        asked = dataclasses.asdict(self.metric) | {"control": self.rows[row].control}
        # Only where there is one: results from before there was any streaming stay what they are.
        return asked if self.stream is None else asked | {"stream": dataclasses.asdict(self.stream)}

    def find_reference(self, row: str) -> str | None:
        """The row that a row is compared with; None for the reference itself."""
        against = self.rows[row].against or self.reference
        return None if against == row else against

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for suite.json."""
        return dataclasses.asdict(self)

    def build_recipe(self, row: str) -> Recipe:
        """The checked recipe of a row, whose seed, output and start are yet to be set. Raises UserError."""
        values = override_recipe(self.base, self.rows[row].overrides)
        values = {**values, "seed": 0, "output": "."}
        if self.rows[row].pretraining is not None:
            values["model"] = {**values.get("model", {}), "init": "."}
        return recipe_from_dict(values, where=f"{self.name}: row {row}")

    def build_pretraining(self, name: str) -> Recipe:
        """The checked recipe of a pretraining, whose output and start are yet to be set. Raises UserError."""
        one = self.pretraining[name]
        values = override_recipe(read_yaml(Path(self.folder) / one.recipe), one.overrides)
        values = {**values, "output": "."}
        if one.after is not None:
            values["model"] = {**values.get("model", {}), "init": "."}
        return recipe_from_dict(values, where=f"{self.name}: pretraining {name}")


def read_suite(file: Path, overrides: Mapping[str, Any] | None = None) -> Suite:
    """Reads a suite; `overrides` are of the base recipe, and below `pretraining.NAME`, `render.NAME`, `metric` and
    `stream` of those.

    Raises:
        UserError: a missing or unreadable file, an unknown or missing key, a name that does not exist or comes twice,
            a value of the wrong kind.
    """
    values = _read_extended(Path(file))
    given = dict(overrides or {})
    for part in ("pretraining", "render"):
        for name, change in (given.pop(part, None) or {}).items():
            _check_known(f"{file}: {part}", name, values.get(part) or {})
            own = values[part][name]
            changed = {**own, "overrides": merge_mappings(own.get("overrides") or {}, change)}
            values[part] = {**values[part], name: changed if part == "pretraining" else {**own, **change}}
    for part in ("metric", "stream"):
        if part in given:
            values[part] = merge_mappings(values.get(part) or {}, given.pop(part) or {})
    return _make_suite(Path(file), values, given)


def _read_extended(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in the file over those that it `extends`; names of files become relative to the outermost file."""
    if file.resolve() in seen:
        raise UserError(f"{file}: extends itself: take extends out")
    _refuse_twice(file)
    values = read_yaml(file)
    if "extends" not in values:
        return values
    name = values.pop("extends")
    if not isinstance(name, str):
        raise UserError(f"{file}: extends={name!r}: give the name of one file")
    if Path(name).parent != Path("."):
        raise UserError(f"{file}: extends={name!r}: give a file of the same folder")
    return merge_mappings(_read_extended(file.parent / name, (*seen, file.resolve())), values)


def _refuse_twice(file: Path) -> None:
    """Raises UserError for a key that a mapping of the file has twice, of which YAML would silently take the last."""
    import yaml

    if not file.is_file():
        return  # read_yaml says it
    try:
        _refuse_twice_in(yaml.compose(file.read_text(encoding="utf-8")), file)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return  # read_yaml says it


def _refuse_twice_in(node: Any, file: Path) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: {twice!r} appears twice in one mapping: rename or remove one of them")
        for _, value in node.value:
            _refuse_twice_in(value, file)


def _make_suite(file: Path, values: dict[str, Any], overrides: dict[str, Any]) -> Suite:
    where = str(file)
    _check_keys(where, values, [f.name for f in dataclasses.fields(Suite) if f.name not in ("name", "folder")])
    for key in ("title", "base", "rows", "reference"):
        if values.get(key) is None:
            raise UserError(f"{where}: missing key {key!r}: see docs/ablations.md")
    base = values["base"]
    if isinstance(base, str):
        base = read_yaml(file.parent / base)
    if not isinstance(base, Mapping):
        raise UserError(f"{where}: base={base!r:.80}: give a recipe's file, or its keys")
    for key in _SET_BY_SUITES & overrides.keys():
        raise UserError(f"{key}={overrides[key]!r} has no effect: a suite has its own (--seeds, --output)")
    rows = {name: _make_part(Row, f"{where}: rows.{name}", name, part) for name, part in _items(values, "rows", where)}
    pretraining = {
        name: _make_part(Pretraining, f"{where}: pretraining.{name}", name, part)
        for name, part in _items(values, "pretraining", where)
    }
    render = {
        name: _make_part(Rendered, f"{where}: render.{name}", None, part)
        for name, part in _items(values, "render", where)
    }
    stream = values.get("stream")
    suite = Suite(
        name=file.stem,
        title=str(values["title"]),
        about=str(values.get("about") or ""),
        base=override_recipe(base, overrides),
        rows=rows,
        reference=str(values["reference"]),
        seeds=read_seeds(where, values.get("seeds", 5)),
        metric=_make_part(Metric, f"{where}: metric", None, values.get("metric") or {}),
        pretraining=pretraining,
        render=render,
        margin=_read_number(where, "margin", values.get("margin", Suite.margin)),
        preset=values.get("preset"),
        stream=None if stream is None else _make_part(Streaming, f"{where}: stream", None, stream),
        folder=str(file.parent),
    )
    _check_suite(where, suite)
    return suite


def _items(values: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    part = values.get(key) or {}
    if isinstance(part, Mapping) and key != "rows":  # what a suite extends is taken out by a null
        part = {name: own for name, own in part.items() if own is not None}
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: {key}: expected a mapping of names, got {part!r:.80}")
    for name in part:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{where}: {key}: {name!r} is not a name: use a-z, 0-9 and _, it becomes a folder")
    return list(part.items())


def _make_part(kind: type, where: str, name: str | None, values: Any) -> Any:
    """A dataclass of the suite from plain data. Raises UserError for keys that it does not have or lacks."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping, got {values!r:.80}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_keys(where, values, [key for key in fields if key != "name" or name is None])
    for key, one in fields.items():
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if needed and key not in values and key != "name":
            raise UserError(f"{where}: missing key {key!r}")
    given = {key: value for key, value in values.items() if value is not None}
    if not isinstance(given.get("overrides", {}), Mapping):
        raise UserError(f"{where}: overrides: expected a mapping, got {given['overrides']!r:.80}")
    made = kind(**given) if name is None else kind(name=name, **given)
    if kind is not Streaming:  # whose own check knows that a window is a number or a word
        _check_kinds(where, made)
    return made


def _check_kinds(where: str, part: Any) -> None:
    """Raises UserError for a value of another kind than the part has there."""
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
        if str in kinds and not isinstance(value, (str, NoneType) if NoneType in kinds else str):
            raise UserError(f"{where}.{one.name}={value!r}: give text (in quotes, where it looks like a number)")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{one.name}={value}: give a number")
    try:
        check_fields(part)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _check_keys(where: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known and key not in _HIDDEN:
            raise UserError(f"{where}: unknown key {key!r}{suggest_nearest_name(str(key), list(known))}")


def _check_known(where: str, name: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise UserError(f"{where}: {name!r} does not exist{suggest_nearest_name(str(name), list(known))}")


def read_seeds(where: str, seeds: Any) -> tuple[int, ...]:
    """The seeds: a list of them, or how many from 0 on. Raises UserError."""
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return tuple(range(seeds))
    if isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds):
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{where}: seeds={seeds}: a seed appears twice, and would count twice: remove one")
        return tuple(seeds)
    raise UserError(f"{where}: seeds={seeds!r}: give a positive number, or a list of whole numbers")


def _read_number(where: str, key: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise UserError(f"{where}: {key}={value!r}: give a share between 0 and 1")


def _check_stream(where: str, stream: Streaming, metric: Metric) -> None:
    if (stream.clips is None) == (stream.chunks is None):
        raise UserError(f"{where}: clips={stream.clips} and chunks={stream.chunks}: set exactly one of the two")
    for name in ("clips", "chunks", "window"):
        value = getattr(stream, name)
        if value is None or (name == "window" and value == "clip"):
            continue
        if type(value) is not int or value < 1:
            raise UserError(f"{where}.{name}={value!r}: give a whole number of at least 1")
    if metric.protocol != OPEN:
        raise UserError(f"{where}: metric.protocol={metric.protocol}: streams are asked openly: use {OPEN}")


def _check_suite(where: str, suite: Suite) -> None:
    """Refuses names that do not exist, claims without a direction, and values out of range."""
    if not suite.rows:
        raise UserError(f"{where}: rows: none are left: name at least one")
    _check_known(f"{where}: reference", suite.reference, suite.rows)
    types = suite.metric.question_types
    if types is not None and not (isinstance(types, list) and types and all(isinstance(one, str) for one in types)):
        raise UserError(f"{where}: metric.question_types={types!r}: give a list of question types, or null for all")
    if suite.preset is not None:
        try:
            check_preset(suite.preset)
        except UserError as error:
            raise UserError(f"{where}: preset: {error}") from None
    for name, one in suite.render.items():
        if one.kind not in KINDS:
            raise UserError(f"{where}: render.{name}.kind={one.kind!r}: choose {', '.join(KINDS)}")
    if suite.stream is not None:
        _check_stream(f"{where}: stream", suite.stream, suite.metric)
    for name, row in suite.rows.items():
        at = f"{where}: rows.{name}"
        for key in _SET_BY_SUITES & row.overrides.keys():
            raise UserError(f"{at}.overrides.{key}: a suite has its own for all rows (seeds, --output): leave it out")
        if row.control is not None:
            from mirasol.evaluation.controls import CONTROLS  # PyTorch, which reading a suite does not need otherwise

            _check_known(f"{at}.control", row.control, CONTROLS)
        if row.against is not None:
            _check_known(f"{at}.against", row.against, suite.rows)
        if row.pretraining is not None:
            _check_known(f"{at}.pretraining", row.pretraining, suite.pretraining)
        if row.expected is not None and row.expected not in EXPECTED:
            raise UserError(f"{at}.expected={row.expected!r}: choose {', '.join(EXPECTED)}")
        if row.expected is not None and suite.find_reference(name) is None:
            raise UserError(f"{at}.expected={row.expected}: it is the reference itself: name another row with against")
    for name, one in suite.pretraining.items():
        chain = [name]
        while (after := suite.pretraining[chain[-1]].after) is not None:
            _check_known(f"{where}: pretraining.{chain[-1]}.after", after, suite.pretraining)
            if after in chain:
                raise UserError(f"{where}: pretraining.{name}.after: {after} comes after itself")
            chain.append(after)
        if not (Path(suite.folder) / one.recipe).is_file():
            raise UserError(f"{where}: pretraining.{name}.recipe: {Path(suite.folder) / one.recipe}: no such file")
