"""From the Metal source that MLX printed to C++17: erases address spaces and attributes, places threadgroup memory.

Owns the reading of the kernel's signature. Lines keep their numbers, so that a report names the line of the printed
source. What a declaration may look like is what MLX prints and what `README.md` allows in a body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .faults import TranslationError

ENTRY = "msl_kernel"
ADDRESS_SPACES = ("device", "constant", "thread", "kernel")
_ATTRIBUTE = re.compile(r"\[\[\s*(?:kernel|host_name\([^)]*\)|max_total_threads_per_threadgroup\([^)]*\))\s*\]\]")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TEMPLATE = re.compile(r"template\s*<([^>]*)>\s*\Z")
_INSTANCE = re.compile(r"^template \[\[host_name.*decltype\(\w+(<.*>)\).*;$", re.M)
_BUFFER = re.compile(
    r"(?P<const>const\s+)?(?:device|constant)\s+(?P<type>[\w<>]+(?:\s*<\w+>)?)\s*(?P<ref>[*&])\s*(?P<name>\w+)\s*"
    r"\[\[buffer\((?P<index>\d+)\)\]\]"
)
_POSITION = re.compile(r"(?P<type>\w+)\s+(?P<name>\w+)\s*\[\[(?P<what>\w+)\]\]")


@dataclass(frozen=True)
class Buffer:
    """A buffer parameter; `output`: not const."""

    name: str
    type: str
    index: int
    output: bool
    reference: bool


@dataclass(frozen=True)
class Kernel:
    """A translated kernel: its C++ and its buffers in the order of their indices."""

    cpp: str
    buffers: tuple[Buffer, ...]


def translate(source: str) -> Kernel:
    """The C++ of one printed kernel. Raises TranslationError for a signature that is not of the known form."""
    found = re.search(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\(", source)
    if not found:
        raise TranslationError("no [[kernel]] function in the source")
    name, opened = found.group(1), found.end()
    closed = _matching(source, opened)
    buffers, positions = _parameters(source[opened:closed])
    instance = _INSTANCE.search(source)
    arguments = instance.group(1) if instance else ""
    if bool(_TEMPLATE.search(source[: found.start()])) != bool(instance):
        raise TranslationError(f"kernel {name}: a template without its instance, or an instance without a template")
    body = source if instance is None else source[: instance.start()]
    body = body[: body.index("[[kernel]]")] + _plain_signature(body[body.index("[[kernel]]") :])
    # One name for all: MLX's tells address spaces apart, which are erased, so that such kernels are compiled once.
    body = re.sub(rf"\b{name}\b", ENTRY, body)
    cpp = f'#include "metal_stdlib.h"\n#line 1 "kernel.metal"\n{_erase(body)}\n'
    return Kernel(cpp + _entry(arguments, buffers, positions), tuple(buffers))


def _matching(text: str, start: int) -> int:
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise TranslationError("the kernel's parameter list does not end")


def _parameters(text: str) -> tuple[list[Buffer], list[str]]:
    """The buffers, and how each parameter is passed, in order."""
    buffers, passed = [], []
    for parameter in re.split(r",\s*\n", text.strip()):
        buffer, position = _BUFFER.search(parameter), _POSITION.search(parameter)
        if buffer:
            found = Buffer(
                buffer["name"], buffer["type"], int(buffer["index"]), buffer["const"] is None, buffer["ref"] == "&"
            )
            buffers.append(found)
            pointer = f"({found.type}{'' if found.output else ' const'}*)buffers[{found.index}]"
            passed.append(f"*{pointer}" if found.reference else pointer)
        elif position:
            passed.append(_position(position["type"], position["what"]))
        else:
            raise TranslationError(f"parameter {parameter.strip()!r} is not understood")
    return sorted(buffers, key=lambda each: each.index), passed


def _position(kind: str, what: str) -> str:
    if kind == "uint3":
        return f"uint3(ids->{what}[0], ids->{what}[1], ids->{what}[2])"
    return f"{kind}(ids->{what})"


def _plain_signature(text: str) -> str:
    return re.sub(r"\s*\[\[\w+(?:\(\d+\))?\]\]", "", text)


def _erase(text: str) -> str:
    text = without_comments(text)
    text = _ATTRIBUTE.sub("", text)
    text = re.sub(r"^(\s*)constant\s+(?!.*\()", r"\1static const ", text, flags=re.M)
    text = re.sub(rf"\b(?:{'|'.join(ADDRESS_SPACES)})\b(?!\s*[=;.,)\[])", "", text)
    return _place_threadgroup(text)


def threadgroup_declarations(text: str) -> list[tuple[int, str]]:
    """Where each `threadgroup` that declares a variable stands in a text without comments, and what it declares.

    Before a pointer or a reference the word only names an address space. Raises TranslationError.
    """
    found = []
    for word in re.finditer(r"\bthreadgroup\b", text):
        after = text[word.end() :]
        end = re.search(r"[*&;,)(=]", _without_template_lists(after))
        if end is None:
            raise TranslationError("a threadgroup declaration does not end")
        declared = after[: end.start()]
        if end.group() in ",=":
            raise TranslationError(f"threadgroup{declared}: declare one variable a line, without an initial value")
        if end.group() == ";":
            found.append((word.start(), declared))
    return found


def without_comments(text: str) -> str:
    """The text with comments blanked, its lines as they were."""
    return _COMMENT.sub(lambda found: "\n" * found.group().count("\n"), text)


def _place_threadgroup(text: str) -> str:
    """`threadgroup T name[n];` becomes a reference to shared memory; before a pointer the word is dropped."""
    out, at = [], 0
    for number, (place, declared) in enumerate(threadgroup_declarations(text)):
        out += [text[at:place], _reference(declared, number)]
        at = place + len("threadgroup") + len(declared)
    return re.sub(r"\bthreadgroup\b", "", "".join([*out, text[at:]]))


def _without_template_lists(text: str) -> str:
    """The text with commas inside <...> blanked, so that they do not end a declaration."""
    return re.sub(r"<[\w\s,:]*>", lambda m: m.group().replace(",", " "), text)


def _reference(declared: str, number: int) -> str:
    found = re.fullmatch(r"\s*(?P<type>.+?)\s*\b(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\])*)\s*", declared, re.S)
    if not found:
        raise TranslationError(f"threadgroup{declared}: not understood")
    alias = f"msl_shared_{number}_{found['name']}"
    return f"typedef {found['type']} {alias}{found['dims']}; auto& {found['name']} = msl_shared<{alias}, {number}>()"


def _entry(arguments: str, buffers: list[Buffer], passed: list[str]) -> str:
    unused = "" if buffers else "(void)buffers; "
    return (
        f'extern "C" void msl_lane(void* const* buffers, const MslIds* ids) {{ {unused}(void)ids; '
        f"{ENTRY}{arguments}({', '.join(passed)}); }}\n"
    )
