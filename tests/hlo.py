"""What XLA's optimised program does to large arrays, read from its text."""

import math
import re

INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.+?) (?P<operation>[a-z][\w-]*)\((?P<operands>[^)]*)"
)
# They move no data.
BOOKKEEPING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}


def passes_over(program: str, elements: int) -> list[str]:
    """The operations of the entry computation that read or write an array of so many elements or more."""
    found, sizes = [], {}
    for line in program.partition("\nENTRY ")[2].partition("\n}")[0].splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            continue
        shapes = re.findall(r"\w+\[([\d,]*)\]", instruction["type"])
        sizes[instruction["name"]] = max((math.prod(map(int, filter(None, x.split(",")))) for x in shapes), default=0)
        touched = [instruction["name"], *re.findall(r"%([\w.-]+)", instruction["operands"])]
        if instruction["operation"] not in BOOKKEEPING and max(sizes.get(name, 0) for name in touched) >= elements:
            found.append(instruction["operation"])
    return found
