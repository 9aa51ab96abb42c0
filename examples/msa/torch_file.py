"""Files and bytes that ``torch.save`` wrote, read by the bounded pickle machine."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

from .safe_pickle import Machine, guarded
from .stand_ins import StoredStorage, refuse

MAGIC = 0x1950A86A20F9469CFC6C


def _storage(identity: Any) -> tuple[str, StoredStorage]:
    """Key and storage of torch's persistent id ``("storage", kind, key, location, count, …)``."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        refuse("an odd persistent id")
    _, kind, key, _, count = identity[:5]
    if kind not in ("bfloat16", "f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?") or not isinstance(key, str):
        refuse("a storage of an odd type")
    if not isinstance(count, int) or not 0 <= count < 1 << 40:
        refuse("a storage of an odd size")
    return key, StoredStorage(kind, count)


def load_from_bytes(data: Any) -> StoredStorage:
    """The storage in the bytes that a pickled tensor carries (torch's older form of ``torch.save``)."""
    if hasattr(data, "read"):
        data = data.read()
    data = bytes(data) if isinstance(data, (bytes, memoryview)) else refuse("a tensor without bytes")
    found: dict[str, StoredStorage] = {}

    def storage(identity: Any) -> StoredStorage:
        key, new = _storage(identity)
        return found.setdefault(key, new)

    position, parts = 0, []
    for _ in range(5):
        machine = Machine(data, position, storage)
        parts.append(machine.load())
        position = machine.position
    magic, _, _, result, keys = parts
    if magic != MAGIC or not isinstance(result, StoredStorage) or not isinstance(keys, list):
        refuse("a tensor in an unknown form")
    for key in keys:
        if key not in found or position + 8 > len(data):
            refuse("a tensor without its data")
        (count,) = struct.unpack_from("<q", data, position)
        size = count * found[key].itemsize
        if count != found[key].count or not 0 <= size <= len(data) - position - 8:
            refuse("a tensor without its data")
        found[key].data = memoryview(data)[position + 8 : position + 8 + size]
        position += 8 + size
    return result


def read_torch(path: Path) -> Any:
    """The object in a zip file of ``torch.save``; tensors stay in the file until they are wanted.

    Raises:
        ValueError: The file is corrupt or holds anything but containers, arrays and tensors.
    """
    return guarded(path, lambda: _Parts(zipfile.ZipFile(path)).load())


class _Parts:
    """The parts of a torch file: a pickle, and a part for each storage.

    Args:
        archive: The file; it stays open as long as one of its tensors is not yet read.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.names = {i.filename: i for i in archive.infolist()}
        root = next((n for n in self.names if n.endswith("data.pkl")), None)
        self.root = root if root is not None else refuse("a zip file without a pickle of torch")
        self.found: dict[str, StoredStorage] = {}

    def load(self) -> Any:
        return Machine(self.read(self.root), 0, self.storage).load()

    def read(self, name: str) -> bytes:
        info = self.names[name]
        # torch stores its parts uncompressed: a compressed part is not torch's, and could unpack to any size.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            refuse(f"a packed part {name[:80]!r}")
        return self.archive.read(info)

    def storage(self, identity: Any) -> StoredStorage:
        key, new = _storage(identity)
        name = f"{self.root[: -len('data.pkl')]}data/{key}"
        if name not in self.names or self.names[name].file_size != new.count * new.itemsize:
            refuse("a tensor without its data")
        if key not in self.found:
            new.data = lambda: self.read(name)
            self.found[key] = new
        return self.found[key]
