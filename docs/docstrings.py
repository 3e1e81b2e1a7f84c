"""The package's docstrings in the form that mkdocstrings knows: a Griffe extension.

The package writes a record's fields as `name: text` without a heading, several names before one
text, "Example:" in the singular, headings between the arguments of a long list, and equations as
"eq. (1)".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ENTRY = re.compile(r"^(?P<indent> *)(?P<names>[a-z]\w*(?:, [a-z]\w*)*):(?P<text>(?: .*)?)$")
SECTION = re.compile(r"^ *[A-Z][a-z]+:")
EQUATION = re.compile(r"\beq\. \((\d)\)")
EQUATIONS = {  # where how-it-works.md has them
    "1": "greedy-forward-selection",
    "2": "squared-error-sums-over-samples-are-enough",
    "3": "the-bound",
    "4": "refit-least-squares-in-every-step",
    "5": "gates-the-loss-to-second-order",
}
HEADING = re.compile(r"^  (?=\S)")  # between arguments, which are indented by four


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        lines = list(_sections(obj.docstring.value.split("\n")))
        if obj.is_class:
            lines = list(_fields(lines))
        text = "\n".join(_entries(lines))
        obj.docstring.value = EQUATION.sub(lambda m: f"[{m[0]}][{EQUATIONS[m[1]]}]", text)


def _sections(lines: list[str]) -> Iterator[str]:
    inside = ""
    for line in lines:
        if SECTION.match(line):
            inside = line.strip()
        if inside == "Args:" and HEADING.match(line) and line[2] != " ":
            yield f"Args: {line.strip()}"
        else:
            yield "Examples:" if line == "Example:" else line


def _fields(lines: list[str]) -> Iterator[str]:
    """Paragraphs of entries without indentation become the section "Attributes:"."""
    inside = False
    for before, line in zip(["", *lines], lines, strict=False):
        entry = ENTRY.match(line)
        if entry and not entry["indent"] and (inside or not before) and entry["text"]:
            if not inside:
                yield "Attributes:"
            inside = True
        elif not line.startswith(" "):
            inside = False
        yield f"    {line}" if inside else line


def _entries(lines: list[str]) -> Iterator[str]:
    """An entry of several names becomes one of each, with the same text."""
    i = 0
    while i < len(lines):
        entry = ENTRY.match(lines[i])
        if not entry or not entry["indent"] or "," not in entry["names"]:
            yield lines[i]
            i += 1
            continue
        end = i + 1
        while end < len(lines) and lines[end].startswith(entry["indent"] + "  "):
            end += 1
        for name in entry["names"].split(", "):
            yield f"{entry['indent']}{name}:{entry['text']}"
            yield from lines[i + 1 : end]
        i = end
