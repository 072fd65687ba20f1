"""How the training room is built: what a run is made of exists before its first step."""

import ast
import dataclasses
from pathlib import Path

import pytest

import mirasol.training

ROOM = Path(mirasol.training.__file__).parent
FILES = sorted(ROOM.glob("*.py"))
CLASSES = [
    pytest.param(node, id=f"{file.stem}.{node.name}")
    for file in FILES
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.ClassDef)
]
# Where an object comes to be: `__post_init__` belongs to a dataclass's constructor.
CONSTRUCTORS = ("__init__", "__post_init__")


def assigned_attributes(node: ast.AST) -> set[str]:
    """The attributes of `self` that are assigned anywhere within the node."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


@pytest.mark.parametrize("node", CLASSES)
def test_no_attribute_appears_after_the_constructor(node):
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    own = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    own = own.union(*(assigned_attributes(method) for method in methods if method.name in CONSTRUCTORS))
    later = set().union(*(assigned_attributes(method) for method in methods if method.name not in CONSTRUCTORS))
    assert later <= own


def test_a_run_is_frozen_and_the_loop_keeps_no_state():
    from mirasol.training.build import Run

    assert dataclasses.is_dataclass(Run)
    assert Run.__dataclass_params__.frozen
    loop = ast.parse((ROOM / "trainer.py").read_text())
    stores = [node for node in ast.walk(loop) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    # Not the run's: the console is the caller's, the loss weights are a stage's, set in the model's config.
    assert {ast.unparse(node) for node in stores} == {"console.quiet", "run.model.config.loss_weights"}
    assert not [node for node in ast.walk(loop) if isinstance(node, ast.ClassDef | ast.Global | ast.Nonlocal)]


def test_the_loop_and_the_room_stay_small():
    lines = {file.name: len(file.read_text().splitlines()) for file in FILES}
    assert lines["trainer.py"] < 250
    assert max(lines.values()) <= 600
    assert len(lines) <= 16  # fifteen and __init__
    (loop,) = (
        node
        for node in ast.parse((ROOM / "trainer.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "run_steps"
    )
    assert loop.end_lineno - loop.lineno < 20
