"""A pickle reader that builds plain containers, NumPy arrays and tensors, and nothing else, within bounds.

A pickle is a program. This machine runs its operations itself and exposes none of Python's or NumPy's own
reconstruction code to it: a forged dtype state can make NumPy take bytes for pointers, a count of a few bytes can ask
for gigabytes, and nesting or sharing can make a small file endless to walk through. Here every operation costs no more
than the bytes it was read from, the depth of containers is limited, and shared parts are counted as often as they
appear.
"""

from __future__ import annotations

import codecs
import mmap
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .pickle_names import ALLOWED, checked_key, make_set
from .pickle_names import _encode as _encode
from .stand_ins import LongText, StoredArray, StoredDType, StoredStorage, refuse
from .stand_ins import plain as plain

MAX_DEPTH = 64
# What a reader may walk through, as a multiple of the file; a part that appears in several places counts each time.
MAX_SHARING = 16
# Containers and remembered values take some 100 bytes each, whatever the file spends on them.
FREE_OBJECTS = 1 << 20
BYTES_PER_OBJECT = 32
# Texts beyond this size are arrays of old protocols and stay unread until an array asks for them.
LONG_TEXT = 1 << 20
_MARK = object()


class _Node:
    """A container on the machine's stack: its depth, its size with all that is in it, and whether it is inside another.

    Picklers fill a container before they put it into another one. What is inside is therefore final, and depth and
    size of every container are exact.
    """

    __slots__ = ("closed", "depth", "size", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.depth, self.size, self.closed = value, 1, 1, False


class Machine:
    """One run over a pickle's bytes.

    Args:
        buffer: The file's bytes.
        start: Where the pickle begins.
        storage: Gives the storage that a persistent id of torch names; None refuses such ids.
    """

    def __init__(self, buffer: Any, start: int = 0, storage: Callable[[Any], StoredStorage] | None = None) -> None:
        self.buffer, self.view, self.position = buffer, memoryview(buffer), start
        self.limit = MAX_SHARING * len(self.view) + 4096
        self.objects = FREE_OBJECTS + len(self.view) // BYTES_PER_OBJECT
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Run up to the end of the pickle; ``position`` is then just past it."""
        view = self.view
        while True:
            code = view[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                return self._inside(self._pop())[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                refuse(f"the operation {bytes([code])!r}, which no array or container needs")
            operation(self)

    # Reading

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.view) - self.position:
            refuse(f"{count} bytes where {len(self.view) - self.position} are left")
        self.position += count
        return self.view[self.position - count : self.position]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.buffer.find(b"\n", self.position)
        if end < 0:
            refuse("a line without an end")
        text = bytes(self.view[self.position : end])
        self.position = end + 1
        return text

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def new(self, value: Any) -> _Node:
        """Account for one more container or remembered value."""
        self.objects -= 1
        if self.objects < 0:
            refuse("more containers than a file of its size can mean")
        return _Node(value)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            refuse("a value from an empty stack")
        return self.stack.pop()

    def top(self) -> _Node:
        """The container on top, still open."""
        node = self.stack[-1] if self.stack else None
        if not isinstance(node, _Node) or node.closed:
            refuse("a change of something that is not an open container")
        return node

    def marked(self) -> list[Any]:
        """Take everything above the last mark off the stack, and the mark itself."""
        items = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        return refuse("a missing mark")

    def _inside(self, item: Any) -> tuple[Any, int, int]:
        """Plain value, depth and size of something that goes into a container, closing it."""
        if isinstance(item, _Node):
            item.closed = True
            return item.value, item.depth, item.size
        if isinstance(item, (str, bytes, memoryview)):
            return item, 0, 1 + len(item)
        return item, 0, 1 + len(item.view) if isinstance(item, LongText) else 1

    def fill(self, node: _Node, items: list[Any]) -> list[Any]:
        """Account for items that go into ``node``; returns their plain values."""
        values = []
        for item in items:
            if item is node:
                refuse("a container inside itself")
            value, depth, size = self._inside(item)
            values.append(value)
            node.size += size
            if depth >= node.depth:
                node.depth = depth + 1
        if node.depth > MAX_DEPTH:
            refuse(f"containers nested more than {MAX_DEPTH} deep")
        if node.size > self.limit:
            refuse(f"shared parts that make it more than {MAX_SHARING} times as large as the file")
        return values

    def container(self, make: Callable[[list[Any]], Any], items: list[Any]) -> None:
        node = self.new(None)
        node.value = make(self.fill(node, items))
        self.push(node)

    # Operations that are more than a push

    def store(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            refuse("a memo of nothing")
        self.new(None)
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            refuse(f"entry {index} of a memo that lacks it")
        self.push(self.memo[index])

    def append(self, items: list[Any]) -> None:
        node = self.top()
        if not isinstance(node.value, list):
            refuse("an item for something that is not a list")
        node.value.extend(self.fill(node, items))

    def set_items(self, items: list[Any]) -> None:
        node = self.top()
        if not isinstance(node.value, dict) or len(items) % 2:
            refuse("an entry for something that is not a dictionary")
        values = self.fill(node, items)
        node.value.update(zip(map(checked_key, values[::2]), values[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        node = self.top()
        if not isinstance(node.value, set):
            refuse("an item for something that is not a set")
        node.value.update(map(checked_key, self.fill(node, items)))

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            refuse("a name that is not text")
        if module in ("torch", "torch.storage") and StoredStorage.named(name) is not None:
            self.push(StoredStorage.named(name))
        elif (module, name) in ALLOWED:
            self.push(ALLOWED[module, name])
        else:
            refuse(f"it asks for {module[:80]}.{name[:80]}, which is neither a container, a NumPy array nor a tensor")

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        node = self.new(None)
        (values,) = self.fill(node, [arguments])
        if not isinstance(values, tuple) or not callable(function):
            refuse("a call of something that cannot be called")
        node.value = function(*values)
        self.push(node)

    def build(self) -> None:
        state = self._pop()
        node = self.top()
        (value,) = self.fill(node, [state])
        if not isinstance(node.value, (StoredArray, StoredDType)):
            refuse("a state for something that has none")
        node.value.set_state(value)

    def persistent(self) -> None:
        (value, _, _) = self._inside(self._pop())
        if self.storage is None:
            refuse("a persistent id outside a file of torch")
        self.push(self.storage(value))

    def text(self, count: int) -> None:
        view = self.take(count)
        self.push(LongText(view) if count > LONG_TEXT else codecs.decode(view, "utf-8", "surrogatepass"))

    def old_text(self, count: int) -> None:
        """Python 2's byte strings: texts in latin1, which is how arrays keep their bytes."""
        view = self.take(count)
        self.push(view if count > LONG_TEXT else codecs.decode(view, "latin1"))

    def quoted(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            refuse("a text without quotes")
        self.push(codecs.escape_decode(line[1:-1])[0].decode("latin1"))

    def integer(self, line: bytes) -> None:
        if len(line) > 40:
            refuse("a number of more than 40 digits")
        self.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def long(self, count: int) -> None:
        if not 0 <= count <= 64:
            refuse("a number of more than 64 bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))


def _constant(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.push(value)


_OPERATIONS: dict[int, Callable[[Machine], Any]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: _constant(_MARK),
        pickle.POP: lambda m: m.stack.pop() if m.stack else refuse("a value from an empty stack"),
        pickle.POP_MARK: lambda m: m.marked(),
        pickle.NONE: _constant(None),
        pickle.NEWTRUE: _constant(True),
        pickle.NEWFALSE: _constant(False),
        pickle.INT: lambda m: m.integer(m.line()),
        pickle.LONG: lambda m: m.integer(m.line()),
        pickle.BININT: lambda m: m.push(m.number("<i")),
        pickle.BININT1: lambda m: m.push(m.number("<B")),
        pickle.BININT2: lambda m: m.push(m.number("<H")),
        pickle.LONG1: lambda m: m.long(m.number("<B")),
        pickle.LONG4: lambda m: m.long(m.number("<i")),
        pickle.FLOAT: lambda m: m.push(float(m.line())),
        pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
        pickle.STRING: lambda m: m.quoted(),
        pickle.BINSTRING: lambda m: m.old_text(m.number("<i")),
        pickle.SHORT_BINSTRING: lambda m: m.old_text(m.number("<B")),
        pickle.UNICODE: lambda m: m.push(codecs.decode(m.line(), "raw-unicode-escape")),
        pickle.SHORT_BINUNICODE: lambda m: m.text(m.number("<B")),
        pickle.BINUNICODE: lambda m: m.text(m.number("<I")),
        pickle.BINUNICODE8: lambda m: m.text(m.number("<Q")),
        pickle.SHORT_BINBYTES: lambda m: m.push(bytes(m.take(m.number("<B")))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
        pickle.BINBYTES8: lambda m: m.push(m.take(m.number("<Q"))),
        pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number("<Q"))),
        pickle.EMPTY_LIST: lambda m: m.push(m.new([])),
        pickle.EMPTY_TUPLE: lambda m: m.push(m.new(())),
        pickle.EMPTY_DICT: lambda m: m.push(m.new({})),
        pickle.EMPTY_SET: lambda m: m.push(m.new(set())),
        pickle.LIST: lambda m: m.container(list, m.marked()),
        pickle.TUPLE: lambda m: m.container(tuple, m.marked()),
        pickle.TUPLE1: lambda m: m.container(tuple, [m._pop()]),
        pickle.TUPLE2: lambda m: m.container(tuple, [m._pop(), m._pop()][::-1]),
        pickle.TUPLE3: lambda m: m.container(tuple, [m._pop(), m._pop(), m._pop()][::-1]),
        pickle.FROZENSET: lambda m: m.container(make_set, m.marked()),
        pickle.DICT: lambda m: (lambda items: (m.push(m.new({})), m.set_items(items)))(m.marked()),
        pickle.APPEND: lambda m: m.append([m._pop()]),
        pickle.APPENDS: lambda m: m.append(m.marked()),
        pickle.SETITEM: lambda m: m.set_items([m._pop(), m._pop()][::-1]),
        pickle.SETITEMS: lambda m: m.set_items(m.marked()),
        pickle.ADDITEMS: lambda m: m.add_items(m.marked()),
        pickle.GLOBAL: lambda m: m.find(m.line().decode(), m.line().decode()),
        pickle.STACK_GLOBAL: lambda m: m.find(*[m._pop(), m._pop()][::-1]),
        pickle.REDUCE: lambda m: m.reduce(),
        pickle.BUILD: lambda m: m.build(),
        pickle.PUT: lambda m: m.store(int(m.line()[:20])),
        pickle.BINPUT: lambda m: m.store(m.number("<B")),
        pickle.LONG_BINPUT: lambda m: m.store(m.number("<I")),
        pickle.MEMOIZE: lambda m: m.store(len(m.memo)),
        pickle.GET: lambda m: m.recall(int(m.line()[:20])),
        pickle.BINGET: lambda m: m.recall(m.number("<B")),
        pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
        pickle.BINPERSID: lambda m: m.persistent(),
    }.items()
}


def read_pickle(path: str | Path) -> Any:
    """Read containers, numbers, strings, arrays and tensors from a pickle of any Python or NumPy version.

    Arrays stay in the file until :func:`plain` asks for them, so what a caller does not want costs nothing.

    Returns:
        The object; arrays inside it are reached through :func:`plain`.

    Raises:
        ValueError: The file is corrupt, truncated, or asks for anything but containers, arrays and tensors. It names
            the file.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: corrupt or truncated pickle (the file is empty)")
    with path.open("rb") as f:
        return guarded(path, lambda: Machine(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)).load())


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """Run ``read``; whatever goes wrong becomes one ValueError that names the file."""
    try:
        return read()
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path}: refused or corrupt pickle: {e}") from e
    except Exception as e:
        # A damaged stream can make any operation of the format fail: to the caller, each failure means "corrupt".
        raise ValueError(f"{path}: corrupt or truncated pickle ({type(e).__name__}: {e})") from e
