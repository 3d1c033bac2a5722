"""Damaged copies of a GGUF file, the same ones every time: bytes flipped, numbers made absurd, tensors cut, shapes swapped.

A row of `MUTATIONS` per kind. The kinds that touch the table of tensors leave the rest of the file readable, so that what is
behind the parser meets them too.
"""

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata
ABSURD = (0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
TYPES = (*range(32), 99)  # numbers of ggml's types, some of which there are


@dataclass(frozen=True)
class Info:
    """A row of the table of tensors: name, sizes (columns first), number of the type, place among the data."""

    name: bytes
    sizes: tuple[int, ...]
    type: int
    offset: int

    def packed(self) -> bytes:
        """As it stands in the file."""
        sizes = struct.pack(f"<I{len(self.sizes)}Q", len(self.sizes), *(size % 2**64 for size in self.sizes))
        return struct.pack("<Q", len(self.name)) + self.name + sizes + struct.pack("<IQ", self.type, self.offset)


@dataclass(frozen=True)
class Anatomy:
    """A GGUF file (version 3) in pieces: packed metadata, the table of tensors, the data."""

    metadata: tuple[bytes, ...]
    infos: tuple[Info, ...]
    data: bytes

    def packed(self) -> bytes:
        """The file."""
        table = b"".join(info.packed() for info in self.infos)
        head = HEADER.pack(b"GGUF", 3, len(self.infos), len(self.metadata)) + b"".join(self.metadata) + table
        return head + bytes(-len(head) % gguf.GGUF_DEFAULT_ALIGNMENT) + self.data

    def without(self, prefix: str) -> "Anatomy":
        """Without the metadata whose keys begin so."""
        return replace(self, metadata=tuple(entry for entry in self.metadata if not _key(entry).startswith(prefix)))


def _key(entry: bytes) -> str:
    (length,) = struct.unpack_from("<Q", entry)
    return entry[8 : 8 + length].decode()


def anatomy(path: Path) -> Anatomy:
    """Take a file apart."""
    content, reader = path.read_bytes(), gguf.GGUFReader(path)
    infos = []
    for tensor in reader.tensors:
        sizes = tuple(int(size) for size in tensor.shape)
        infos.append(
            Info(tensor.name.encode(), sizes, int(tensor.tensor_type), tensor.data_offset - reader.data_offset)
        )
    places = [found.offset for key, found in reader.fields.items() if not key.startswith("GGUF.")]
    ends = [*places[1:], reader.tensors[0].field.offset]
    metadata = tuple(content[start:end] for start, end in zip(places, ends, strict=True))
    return Anatomy(metadata, tuple(infos), content[reader.data_offset :])


Mutation = Callable[[random.Random, Anatomy], bytes]


def _place(draw: random.Random, file: Anatomy, content: bytes) -> int:
    """A place in the file, mostly before the data, which anything may be in."""
    head = len(content) - len(file.data)
    return draw.randrange(head if draw.random() < 0.9 else len(content))


def _flipped(draw: random.Random, file: Anatomy) -> bytes:
    content = bytearray(file.packed())
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[_place(draw, file, content)] ^= 1 << draw.randrange(8)
    return bytes(content)


def _absurd(draw: random.Random, file: Anatomy) -> bytes:
    content = bytearray(file.packed())
    place, number = _place(draw, file, content), draw.choice(ABSURD).to_bytes(8, "little")
    size = draw.choice((4, 8))
    content[place : place + size] = number[:size]
    return bytes(content)


def _value(start: int, numbers: tuple[int, ...], size: int) -> Mutation:
    """Another number in one of the metadata, so many bytes after its key: 0: its type, 4: value or length, 8: an array's."""

    def mutation(draw: random.Random, file: Anatomy) -> bytes:
        metadata = [bytearray(entry) for entry in file.metadata]
        entry = draw.choice(metadata)
        place = 8 + len(_key(entry)) + start
        entry[place : place + size] = (draw.choice(numbers) % 256**size).to_bytes(size, "little")[: len(entry) - place]
        return replace(file, metadata=tuple(map(bytes, metadata))).packed()

    return mutation


def _cut_short(draw: random.Random, file: Anatomy) -> bytes:
    content = file.packed()
    return content[: _place(draw, file, content)]


def _table(change: Callable[[random.Random, list[Info]], None]) -> Mutation:
    def mutation(draw: random.Random, file: Anatomy) -> bytes:
        infos = list(file.infos)
        change(draw, infos)
        return replace(file, infos=tuple(infos)).packed()

    return mutation


def _without(draw: random.Random, infos: list[Info]) -> None:
    del infos[draw.randrange(len(infos))]


def _twice(draw: random.Random, infos: list[Info]) -> None:
    infos.insert(draw.randrange(len(infos)), draw.choice(infos))


def _swapped(field: str) -> Callable[[random.Random, list[Info]], None]:
    """Two tensors of one block or of two exchange what the field says."""

    def change(draw: random.Random, infos: list[Info]) -> None:
        one, other = draw.sample(range(len(infos)), 2)
        first, second = getattr(infos[one], field), getattr(infos[other], field)
        infos[one], infos[other] = replace(infos[one], **{field: second}), replace(infos[other], **{field: first})

    return change


def _one(changed: Callable[[random.Random, Info], Info]) -> Callable[[random.Random, list[Info]], None]:
    def change(draw: random.Random, infos: list[Info]) -> None:
        i = draw.randrange(len(infos))
        infos[i] = changed(draw, infos[i])

    return change


def _transposed(_: random.Random, info: Info) -> Info:
    return replace(info, sizes=info.sizes[::-1] if len(info.sizes) > 1 else (1, *info.sizes))


def _resized(draw: random.Random, info: Info) -> Info:
    sizes = list(info.sizes)
    i = draw.randrange(len(sizes))
    sizes[i] = draw.choice(
        (sizes[i] - 1, sizes[i] + 1, sizes[i] // 2, sizes[i] * 2, sizes[i] - 32, draw.choice(ABSURD))
    )
    return replace(info, sizes=tuple(sizes))


def _renamed(draw: random.Random, info: Info) -> Info:
    """As another part of the same matrix."""
    parts = (b".prime.weight", b".lr_a.weight", b".lr_b.weight", b".weight", b".bias")
    base = next((info.name.removesuffix(part) for part in parts if info.name.endswith(part)), info.name)
    return replace(info, name=base + draw.choice(parts))


MUTATIONS: dict[str, Mutation] = {
    "flipped bits": _flipped,
    "an absurd number": _absurd,
    "an absurd value": _value(4, ABSURD, 4),
    "an absurd length": _value(8, ABSURD, 8),
    "a value of another type": _value(0, tuple(range(14)), 4),
    "cut short": _cut_short,
    "a tensor less": _table(_without),
    "a tensor twice": _table(_twice),
    "swapped shapes": _table(_swapped("sizes")),
    "swapped names": _table(_swapped("name")),
    "another place": _table(_swapped("offset")),
    "transposed": _table(_one(_transposed)),
    "another size": _table(_one(_resized)),
    "another type": _table(_one(lambda draw, info: replace(info, type=draw.choice(TYPES)))),
    "another part's name": _table(_one(_renamed)),
}


def mutations(file: Anatomy, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(kind, content) of that many damaged copies of a file, all kinds in turn."""
    kinds = list(MUTATIONS)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        yield f"{kind} ({i})", MUTATIONS[kind](random.Random(f"{seed} {i}"), file)
