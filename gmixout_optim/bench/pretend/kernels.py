"""Launches and bytes of the source that :mod:`.capture` keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product

import numpy as np

_BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "fp16": 2, "bf16": 2, "i32": 4, "fp32": 4}
_BYTES |= {"i64": 8, "fp64": 8}

_KERNEL = re.compile(
    r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", re.S | re.M
)
_ACCESS = re.compile(r"tl\.(load|store|atomic_add)\((\w+) \+ \((.*)$")


@dataclass
class Kernel:
    """What one launch moves.

    Attributes:
        direct: bytes that are read and written in order, each address once.
        gathered, scattered: elements that are read and written at places found in memory, by their
            size in bytes.
        is_atomic: whether it adds atomically.
    """

    direct: int = 0
    gathered: dict[int, int] = field(default_factory=dict)
    scattered: dict[int, int] = field(default_factory=dict)
    is_atomic: bool = False

    @property
    def bytes(self) -> int:
        moved = [*self.gathered.items(), *self.scattered.items()]
        return self.direct + sum(size * count for size, count in moved)


@dataclass
class Graph:
    """One captured source.

    Attributes:
        launches: its kernels, as often as they are launched.
        others: lines that call something that is no kernel of the compiler's.
        on_host: calls of code for the CPU.
    """

    launches: list[Kernel]
    others: list[str]
    on_host: list[str]

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.launches)


def read_graph(source: str) -> Graph:
    kernels = {name: _read_kernel(text) for name, text in kernels_of(source).items()}
    body = source[source.index("def call(self, args)") :]
    lines = [line.strip() for line in body[: body.index("runner = ")].splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    launched = re.findall(r"(triton_\w+)\.run\(", "\n".join(code))
    foreign = re.compile(r"extern_kernels|aten\.|torch\.ops|\.copy_\(|\.zero_\(|fallback")
    return Graph(
        [kernels[name] for name in launched],
        [line for line in code if foreign.search(line)],
        [line for line in code if re.match(r"cpp_fused\w*\(", line)],
    )


def kernels_of(source: str) -> dict[str, str]:
    """The code of a source's kernels, by name."""
    return dict(_KERNEL.findall(source))


def _read_kernel(text: str) -> Kernel:
    signature = re.search(r"'signature': \{(.*?)\}", text)
    assert signature is not None
    types = dict(re.findall(r"'(\w+)': '(\*?\w+)'", signature.group(1)))
    kernel = Kernel()
    count, rows, names = 0, 1, dict[str, str]()
    for line in text.split("@triton.jit")[1].splitlines():
        assigned = re.match(r"\s*(\w+) = (.*)$", line)
        if assigned and assigned.group(1) == "ynumel":
            rows = int(assigned.group(2))
        elif assigned and assigned.group(1) == "xnumel":
            count, names = int(assigned.group(2)) * rows, {}
        elif assigned and re.fullmatch(r"[xy]\d+", assigned.group(1)):
            names[assigned.group(1)] = assigned.group(2)
        access = _ACCESS.search(line)
        if not access:
            continue
        kind, pointer, rest = access.groups()
        size = _BYTES[types[pointer].lstrip("*")]
        address = _first_argument(rest)
        kernel.is_atomic |= kind == "atomic_add"
        if "tmp" in address:
            places = kernel.gathered if kind == "load" else kernel.scattered
            places[size] = places.get(size, 0) + count
        else:
            kernel.direct += size * _distinct(address, names, count)
    return kernel


def _first_argument(text: str) -> str:
    """The text up to the parenthesis that closes what has been opened before it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place]
    return text


def _distinct(address: str, names: dict[str, str], count: int) -> int:
    """How many addresses there are over ``count`` elements."""
    used = re.findall(r"[xy]\d+", address)
    if not used:
        return 1
    if any(names.get(name) == "yindex" for name in used):
        return count
    if names.get(address.strip("() ")) == "xindex":
        return count
    values: dict[str, object] = {"xindex": np.arange(count)}
    for name in dict.fromkeys(used):
        values[name] = eval(names[name], {}, values)
    places = eval(address, {}, values)
    return int(np.unique(places).size)


def early_writes(source: str, pairs: list[tuple[int, int]]) -> list[str]:
    """Where a parameter may be read after it was written, which a graph takes for two tensors.

    That is in a later launch than the write, or in another part of the same launch, whose parts run
    side by side.

    Args:
        pairs: numbers of the arguments that are read and written.
    """
    kernels = kernels_of(source)
    body = source[source.index("def call(self, args)") :]
    arguments = re.search(r"\n\s+(arg\w+(?:, arg\w+)*),? = args", body)
    assert arguments is not None
    names = [name.strip() for name in arguments.group(1).split(",")]
    reads: dict[str, set[tuple[int, int]]] = {}
    writes: dict[str, set[tuple[int, int]]] = {}
    launches = re.findall(r"(triton_\w+)\.run\((.*?), stream", body)
    for launch, (name, given) in enumerate(launches):
        code = kernels[name].split("@triton.jit")[1]
        signature = re.search(r"def \w+\((.*?)\):", code, re.S)
        assert signature is not None
        pointers = [pointer.split(":")[0].strip() for pointer in signature.group(1).split(",")]
        passed = [each.strip() for each in re.sub(r"\([^)]*\)", "", given).split(",")]
        argument_of = dict(zip(pointers, passed, strict=False))
        part = 0
        for line in code.splitlines():
            part += bool(re.match(r"\s*(if|elif) pid <", line))
            for kind, pointer in re.findall(r"tl\.(load|store)\((\w+) \+", line):
                table = reads if kind == "load" else writes
                table.setdefault(argument_of.get(pointer, ""), set()).add((launch, part))
    found = []
    for read, written in pairs:
        places = reads.get(names[read], set()), writes.get(names[written], set())
        if not all(places):
            found.append(f"argument {read} is not read, or {written} not written")
        for (launch, part), (later, other) in product(*places):
            if launch > later or (launch == later and part != other):
                found.append(f"argument {read} is read in launch {launch}, written in {later}")
    return found
