"""Runs a small whitelisted part of Python by interpretation: the way to score code that a model wrote.

Nothing is compiled or executed; work, sizes and numbers are bounded.
"""

import ast
import operator


class Unsupported(Exception):
    """The code uses something outside of the whitelist, or too much time or space."""


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda x, y: x in y,
    ast.NotIn: lambda x, y: x not in y,
}  # fmt: skip
CALLS = {
    "abs": abs,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "range": range,
    "sorted": sorted,
    "sum": sum,
}
METHODS = {"lower": str.lower, "upper": str.upper}
MAX_SIZE = 4_000  # items of a list or range, characters of a string
MAX_STEPS = 50_000  # nodes evaluated in one call
MAX_NUMBER = 10**12


class _Return(Exception):
    """Carries the value of a return statement."""


class _Interpreter:
    """Evaluates whitelisted syntax trees; `names` maps local names to values."""

    def __init__(self, names):
        self.names, self.steps = names, 0

    def _checked(self, value):
        """`value` if it is small enough and of a plain type."""
        if isinstance(value, (int, float)):
            if abs(value) <= MAX_NUMBER:
                return value
        elif value is None or (isinstance(value, (str, list, tuple, range)) and len(value) <= MAX_SIZE):
            return value
        raise Unsupported("value too large or of a strange type")

    def _binary(self, op, x, y):
        if type(op) not in OPERATORS:
            raise Unsupported(type(op).__name__)
        if isinstance(op, ast.Mult):  # a sequence times a number: look at the size first
            for sequence, times in ((x, y), (y, x)):
                repeated = isinstance(sequence, (str, list, tuple)) and isinstance(times, int)
                if repeated and len(sequence) * times > MAX_SIZE:
                    raise Unsupported("sequence too long")
        if isinstance(op, ast.Mod) and not (isinstance(x, (int, float)) and isinstance(y, (int, float))):
            raise Unsupported("string formatting")
        return self._checked(OPERATORS[type(op)](x, y))

    def _step(self):
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Unsupported("too many steps")

    def run(self, statements):
        """Run statements; a return statement raises `_Return`."""
        for node in statements:
            self._step()
            if isinstance(node, ast.Return):
                raise _Return(None if node.value is None else self.value(node.value))
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._assign(node.targets[0], self.value(node.value))
            elif isinstance(node, ast.AugAssign):
                self._assign(
                    node.target, self._binary(node.op, self.value(node.target), self.value(node.value))
                )
            elif isinstance(node, ast.If):
                self.run(node.body if self.value(node.test) else node.orelse)
            elif isinstance(node, ast.For) and not node.orelse:
                for item in self.value(node.iter):
                    self._assign(node.target, item)
                    self.run(node.body)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                raise Unsupported(type(node).__name__)

    def _assign(self, target, value):
        if not isinstance(target, ast.Name):
            raise Unsupported("assignment to something else than a name")
        self.names[target.id] = value

    def value(self, node):
        """The value of an expression."""
        self._step()
        if isinstance(node, ast.Constant):
            return self._checked(node.value)
        if isinstance(node, ast.Name):
            return self.names[node.id]
        if isinstance(node, ast.BinOp):
            return self._binary(node.op, self.value(node.left), self.value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](self.value(node.operand))
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                result = self.value(part)
                if bool(result) == isinstance(node.op, ast.Or):
                    break
            return result
        if isinstance(node, ast.Compare):
            left = self.value(node.left)
            for op, part in zip(node.ops, node.comparators, strict=True):
                right = self.value(part)
                if not self._binary(op, left, right):
                    return False
                left = right
            return True
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.value(node.test) else node.orelse)
        if isinstance(node, (ast.List, ast.Tuple)):
            return self._flat([self.value(part) for part in node.elts])
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)) and len(node.generators) == 1:
            return self._comprehension(node.elt, node.generators[0])
        if isinstance(node, ast.Subscript):
            return self._checked(self.value(node.value)[self.value(node.slice)])
        if isinstance(node, ast.Call) and not node.keywords:
            return self._call(node)
        raise Unsupported(type(node).__name__)

    def _comprehension(self, element, loop):
        result = []
        for item in self.value(loop.iter):
            self._assign(loop.target, item)
            if all(self.value(test) for test in loop.ifs):
                result.append(self.value(element))
        return self._flat(result)

    def _flat(self, items):
        """`items`, a list of numbers and strings: nested lists could grow without bound."""
        if any(isinstance(item, (list, tuple, range)) for item in items):
            raise Unsupported("nested list")
        return self._checked(items)

    def _call(self, node):
        arguments = [self.value(part) for part in node.args]
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            return self._checked(CALLS[node.func.id](*arguments))
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not arguments:
            return self._checked(METHODS[node.func.attr](self.value(node.func.value)))
        raise Unsupported("call")


def run_function(source: str, entry_point: str, arguments: tuple):
    """The result of `entry_point`, as defined in `source`, called with positional `arguments`."""
    if len(source) > 4000:
        raise Unsupported("source too long")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            names = [argument.arg for argument in node.args.args]
            try:
                _Interpreter(dict(zip(names, arguments, strict=True))).run(node.body)
            except _Return as result:
                return result.args[0]
            return None
    raise Unsupported("no such function")
