"""What type checkers are told of the compiled module is what it holds."""

import ast
from pathlib import Path

import river_ext
from river_ext import _C

FOLDER = Path(river_ext.__file__).parent
STUB = ast.parse((FOLDER / "_C.pyi").read_text()).body
ONLY_WITH_CUDA = {"cuda_image", "read_ring"}


def functions():
    return {node.name: node for node in STUB if isinstance(node, ast.FunctionDef)}


def classes():
    return {node.name for node in STUB if isinstance(node, ast.ClassDef) and node.name[0] != "_"}


def test_the_stub_has_the_names_of_the_module():
    constants = {node.target.id for node in STUB if isinstance(node, ast.AnnAssign)}
    lacking = set() if _C.build_info()["cuda"] else ONLY_WITH_CUDA
    assert (
        constants | classes() | functions().keys() == {name for name in dir(_C) if name[:2] != "__"} | lacking
    )
    assert all(isinstance(getattr(_C, name), int) for name in constants)


def test_the_stub_has_the_keys_of_the_build_info():
    (info,) = (node for node in STUB if isinstance(node, ast.ClassDef) and node.name == "_BuildInfo")
    kinds = {field.target.id: field.annotation.id for field in info.body}
    assert kinds == {name: type(value).__name__ for name, value in _C.build_info().items()}


def test_every_function_of_the_stub_says_what_it_does():
    assert all(ast.get_docstring(function) for function in functions().values())


def test_the_package_says_that_it_is_typed():
    assert (FOLDER / "py.typed").exists()
