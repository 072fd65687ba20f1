"""The model is mathematics: it knows no devices, precisions, compilers or processes, and imports nothing but config."""

import ast
import inspect
from pathlib import Path

import pytest

import mirasol.model
from mirasol import MirasolForConditionalGeneration

FOLDER = Path(mirasol.model.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
# Attributes and names that choose by device, precision, compiler or process.
BRANCHES = {
    "is_cuda", "is_cpu", "is_meta", "is_compiling", "is_autocast_enabled", "autocast", "is_grad_enabled", "compiler",
    "compile", "_dynamo", "distributed", "dist", "checkpoint", "is_floating_point", "bfloat16", "float16", "half",
}  # fmt: skip
ALLOWED = {"kernels.py", "hf.py", "outputs.py"}


def names(tree: ast.AST) -> set[str]:
    """Every name and attribute that the code mentions."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def device_types(tree: ast.AST) -> list[int]:
    """Lines with `device.type`."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "type" and "device" in ast.unparse(node.value)
    ]


def dtype_branches(tree: ast.AST) -> list[int]:
    """Lines that compare a dtype."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Compare) and "dtype" in ast.unparse(node)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_kernels_and_hf_know_how_the_model_is_computed(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = names(tree) & BRANCHES, device_types(tree), dtype_branches(tree)
    assert file.name in ALLOWED or found == (set(), [], [])


def test_the_check_finds_what_it_looks_for():
    tree = ast.parse((FOLDER / "kernels.py").read_text(encoding="utf-8"))
    assert {"is_cuda", "is_compiling", "autocast", "checkpoint"} <= names(tree)
    assert device_types(tree) and dtype_branches(tree)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_model_imports_config_and_errors_alone(file):
    """Function-level imports included."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module)
    ours = {module for module in modules if module.split(".")[0] == "mirasol"}
    assert all(module.startswith(("mirasol.config.", "mirasol.model.", "mirasol.errors")) for module in ours), ours


def test_forward_fits_one_screen():
    function = ast.parse(inspect.cleandoc(inspect.getsource(MirasolForConditionalGeneration.forward))).body[0]
    after_docstring = function.body[1:]
    assert after_docstring[-1].end_lineno - after_docstring[0].lineno + 1 <= 40


def test_comments_and_docstrings_cite_the_paper():
    """Wherever the paper is read: every file of the figure names the section, table or figure it follows."""
    for name in (
        "tubes", "encoder", "combiner", "token_turing", "latent", "reconstruction", "text", "contrastive", "losses",
        "transformer",
    ):  # fmt: skip
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert any(word in text for word in ("supplement", "Table ", "Figure ")), name
