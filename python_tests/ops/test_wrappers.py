"""The functions of `ops.py` hand every argument on to its place.

They do so by position, as torch takes 15 us longer for a call by keywords.
"""

import inspect

import pytest
import torch

from river_ext import ops

NAMES = sorted(vars(ops._river))


def schema(name):
    return [argument.name for argument in getattr(torch.ops.river, name).default._schema.arguments]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_has_the_arguments_of_its_op(name):
    assert list(inspect.signature(getattr(ops, name)).parameters) == schema(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_arrives_at_its_place(monkeypatch, name):
    values = {argument: object() for argument in schema(name)}
    if "dtype" in values:
        values["dtype"] = torch.float16  # the one value that a wrapper looks at
    got = []
    monkeypatch.setattr(ops._river, name, lambda *arguments: got.append(arguments))
    getattr(ops, name)(**values)
    assert len(got) == 1 and len(got[0]) == len(values)
    for value, argument in zip(got[0], schema(name), strict=True):
        assert value is values[argument], argument
