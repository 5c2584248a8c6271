"""How the docstrings of the package become pages: their lists of arguments as lists, dataclasses with their fields."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable

from autodoc2.render.myst_ import MystRenderer
from myst_parser.parsers.sphinx_ import MystParser

ENTRY = re.compile(r"(`?[a-z_]\w*`?(?:, `?[a-z_]\w*`?)*): (?=\S)")
INNER = {"ABC", "BetaSDE", "VariancePreserving", "Module", "object"}
TITLE = re.compile(r"(Arguments|Args|Attributes):$")


def as_markdown(doc: str) -> str:
    """The docstring with `name: text` entries, indented under "Arguments:" or in a block of their own, as a Markdown list."""
    doc = re.sub(r"(?m)(^|(?<=[.\s]))Layer \d\.(;[^.\n]*\.)? ?", r"\1", inspect.cleandoc(doc))
    out, lines, i = [], doc.split("\n"), 0
    while i < len(lines):
        if (title := TITLE.match(lines[i])) and i + 1 < len(lines) and lines[i + 1].startswith(" "):
            end = i + 1
            while end < len(lines) and lines[end].startswith(" "):
                end += 1
            name = "Arguments" if title[1] == "Args" else title[1]
            out += [
                "",
                f"**{name}**",
                "",
                *entries(inspect.cleandoc("\n" + "\n".join(lines[i + 1 : end])).split("\n")),
                "",
            ]
            i = end
            continue
        end = i
        while end < len(lines) and lines[end].strip():
            end += 1
        block = lines[i:end]
        starts = [line for line in block if not line.startswith(" ")]
        if len(starts) > 1 and all(ENTRY.match(line) for line in starts):
            out += ["", *entries(block), ""]
            i = end
            continue
        out.append(lines[i])
        i += 1
    return "\n".join(out)


def entries(lines: list[str]) -> Iterable[str]:
    """`name: text` with indented continuations -> list items."""
    for line in lines:
        if found := ENTRY.match(line):
            yield f"- `{found[1].replace('`', '').replace(', ', '`, `')}`: {line[found.end() :]}"
        else:
            yield f"  {line.strip()}"


def arguments_of(doc: str) -> tuple[str, dict[str, str]]:
    """A command's docstring without its arguments, in one-line paragraphs, and what each argument means."""
    about, _, rest = doc.partition("\n\nArgs:\n")
    meaning: dict[str, str] = {}
    for line in inspect.cleandoc("\n" + rest).split("\n"):
        if found := ENTRY.match(line):
            name = found[1]
            meaning[name] = line[found.end() :]
        elif line.strip():
            meaning[name] += f" {line.strip()}"
    return re.sub(r"((?:scoresde \w+ [A-Z]+ )?--\w+(?: true| tuned)?)", r"`\1`", about), {
        k: re.sub(r"(--[a-z]+)", r"`\1`", v) for k, v in meaning.items()
    }


class Parser(MystParser):
    """Markdown docstrings, after `as_markdown`."""

    def parse(self, inputstring, document) -> None:
        super().parse(as_markdown(inputstring), document)


class Renderer(MystRenderer):
    """autodoc2's, with the fields of a dataclass as the arguments that they are, and public bases only."""

    def is_hidden(self, item) -> bool:
        """Methods that do what the class above says of them are described there."""
        return bool(item.get("doc_inherited")) or super().is_hidden(item)

    def render_class(self, item) -> Iterable[str]:
        public = [base for base in item.get("bases", []) if base.rpartition(".")[2] not in INNER and "._" not in base]
        lines = super().render_class({**item, "bases": public})
        first = next(iter(lines)).replace("(*args: Any, **kwargs: Any)", "")  # torch.nn.Module's own
        module, _, name = item["full_name"].rpartition(".")
        found = getattr(importlib.import_module(module), name, None)
        if "(" not in first and dataclasses.is_dataclass(found):
            fields = [p.replace(annotation=p.empty) for p in inspect.signature(found).parameters.values()]
            first += "(" + ", ".join(str(p) for p in fields if "factory" not in str(p.default)) + ")"
        yield first
        yield from lines
