"""Safetensors files read in slices, front to back, so that memory does not grow with the file."""

import collections
import hashlib
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

from ..files import json
from ..files.regular import open_regular
from ..files.text import first_few, shown

# The names of the format (https://github.com/huggingface/safetensors#format).
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")  # in the name of a model's shard
SLICE = 2 * 2**20  # bytes read at once
BUFFERS = 128  # slices in memory, 268 MB: those of one tensor, those in the threads, and some to read ahead into
MOST_KEPT = 72  # slices of one tensor kept in memory, 150 MB; the largest weight of Wan 14B has 142 MB in BF16
MAX_HEADER = 8 * 2**20  # bytes; WorldStereo's has 0.3 MB, and a workflow saved in the metadata can add a few MB
MAX_NAME = 300  # characters of a tensor's name; the longest of a checkpoint has under 100
ENTRY = ("dtype", "shape", "data_offsets")  # of a tensor in a header
MAX_AXES = 8
MAX_TENSORS = 20_000  # WorldStereo has 2351
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Tensor:
    """A tensor's header entry; its bytes start at `begin` in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    file: Path = None  # type: ignore[assignment]  # None for a tensor that is not written yet

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorFiles:
    """One safetensors file, or the shards of one model in the order of their names."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]  # in the order of the bytes
    metadata: dict[str, str]  # of the first file
    states: tuple[tuple, ...]  # each file's `file_state` when its header was read

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_unchanged(self):
        """Raises ValueError if a file was replaced or written to since its header was read."""
        for path, state in zip(self.files, self.states):
            if file_state(path) != state:
                raise ValueError(
                    f"{shown(path.name)} changed while it was read. Start again when nothing writes to it any more."
                )

    def slices(self, tensor: Tensor, elements: int = SLICE // 4) -> Iterator[torch.Tensor]:
        """The tensor's values in order, flat, `elements` at a time. Raises ValueError if the file is shorter by now."""
        dtype = DTYPES[tensor.dtype]
        with open_regular(tensor.file) as file:
            file.seek(tensor.begin)
            for start in range(0, tensor.count, elements):
                buffer = bytearray(min(elements, tensor.count - start) * dtype.itemsize)
                _fill(file, memoryview(buffer), tensor.file)
                yield torch.frombuffer(buffer, dtype=dtype)


@dataclass(frozen=True)
class Progress:
    """How much of the tensors has been read, and in how many seconds."""

    nbytes: int
    total_nbytes: int
    tensors: int
    total_tensors: int
    seconds: float

    def __str__(self):
        speed = self.nbytes / max(self.seconds, 1e-9)
        left = (self.total_nbytes - self.nbytes) / max(speed, 1.0)
        return (
            f"{self.nbytes / self.total_nbytes:4.0%}  {self.tensors} of {self.total_tensors} tensors  "
            f"{speed / 1e6:.0f} MB/s  {int(left) // 60}:{int(left) % 60:02d} left"
        )


OnProgress = Callable[[Progress], None]  # called after each slice; an exception from it ends the work


def open_files(path: str | Path) -> TensorFiles:
    """The tensors of a .safetensors file, or of the shards that a .safetensors.index.json names.

    Raises ValueError for anything else (a pickle, a truncated file, an index that contradicts its shards) and
    FileNotFoundError for missing shards.
    """
    path = Path(path)
    name = shown(path.name)
    if path.is_dir() or SHARD.search(path.name):
        raise ValueError(
            f"{name} is {'a folder' if path.is_dir() else 'one shard of a model'}. Give the .safetensors "
            f"file, or for a model in shards its {INDEX_SUFFIX}."
        )
    if not path.name.endswith(INDEX_SUFFIX):
        state = file_state(path)
        tensors, metadata = read_header(path)
        _check_dtypes(path, tensors)
        return TensorFiles(path, (path,), tensors, metadata, (state,))
    weight_map = _weight_map(path)
    files = tuple(path.parent / shard for shard in sorted(set(weight_map.values())))
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"{name} names {len(files)} shards; of them {first_few(missing)} is missing beside it. "
            "Download the missing ones."
        )
    states = tuple(file_state(file) for file in files)
    tensors, headers = {}, []
    for file in files:
        found, file_metadata = read_header(file)
        _check_dtypes(file, found)
        headers.append(file_metadata)
        for tensor in found:
            if weight_map.get(tensor) != file.name:
                raise ValueError(
                    f"{shown(file.name)} holds {shown(tensor)}, which {name} places in "
                    f"{shown(weight_map.get(tensor, 'no shard'))}. Index and shards do not belong together; "
                    "download both again."
                )
        tensors |= found
    for tensor, shard in weight_map.items():
        if tensor not in tensors:
            raise ValueError(
                f"{name} places {shown(tensor)} in {shown(shard)}, which does not hold it. Index and shards "
                "do not belong together; download both again."
            )
    return TensorFiles(path, files, tensors, headers[0], states)


def _weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor in an index. Raises ValueError for shards outside the index's own folder."""
    name = shown(path.name)
    try:
        index = json.read(path)
    except ValueError as e:
        raise ValueError(f"{name} is not an index of shards. {e} Download it again.") from e
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) and shard and "\0" not in shard for shard in weight_map.values())
    ):
        raise ValueError(
            f"{name} is not an index of shards: its weight_map does not give the shard's file name for each tensor. "
            "Download it again."
        )
    if any(PureWindowsPath(shard).name != shard or shard == ".." for shard in set(weight_map.values())):
        raise ValueError(f"{name} names shards outside its own folder. Use the index that belongs to the shards.")
    return weight_map


def file_state(path: str | Path) -> tuple:
    """What changes when a file is replaced or written to: device and inode, size, modification time."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def state_if_there(path: str | Path) -> tuple | None:
    """`file_state`, or None if there is no such file."""
    try:
        return file_state(path)
    except OSError:
        return None


def _check_dtypes(path: Path, tensors: dict[str, Tensor]):
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{shown(path.name)}: {shown(name)} has the dtype {shown(tensor.dtype)}, which is not supported. Use "
                "a file whose weights are BF16, FP16, FP32 or FP8."
            )


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in the order of their bytes, and the metadata of a safetensors file, from its first bytes.

    Raises ValueError, naming the file, for anything that is not a whole safetensors file: a pickle, a truncated
    download, a broken header, tensors that do not fill the file without gap or overlap.
    """
    path = Path(path)
    name = shown(path.name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start.startswith(PICKLE_STARTS):
            raise ValueError(
                f"{name} is a pickle (.pt, .pth, .bin or .ckpt), which can run code when it is read. "
                "Only safetensors files are read: download that version of the model."
            )
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            if start.startswith(b"<"):
                raise ValueError(f"{name} is a web page, not a model. Download the file itself.")
            raise ValueError(
                f"{name} is not a safetensors file: its header length is {length} bytes. Download it again."
            )
        begin = 8 + length
        if begin > size:
            raise ValueError(
                f"{name} is cut short: {size} bytes, but its header alone has {length}. Download it again."
            )
        text = bytearray(length)
        _fill(file, memoryview(text), path)
    where = f"{name} is not a safetensors file: its header"
    try:
        header = json.parse(bytes(text), where, limit=MAX_HEADER, object_pairs_hook=_unique)
    except _Twice as e:
        raise ValueError(f"{name} holds {e} twice. Make the file again.") from e
    except ValueError as e:
        raise ValueError(f"{e}. Download it again.") from e
    broken = f"{name} has a broken safetensors header"
    again = "Download it again."
    if not isinstance(header, dict):
        raise ValueError(f"{broken}: it is {shown(type(header).__name__)}. {again}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(t) for pair in metadata.items() for t in pair):
        raise ValueError(f"{broken}: its metadata is not text. {again}")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{name} holds {len(header)} tensors; files of more than {MAX_TENSORS} are not read.")
    entries = sorted((_tensor(n, info, path, begin, broken) for n, info in header.items()), key=_place)
    expected = begin + max((last for _, _, last in entries), default=0)
    if size != expected:
        raise ValueError(
            f"{name} has {size} bytes, its header promises {expected}: the file is "
            f"{'cut short' if size < expected else 'damaged'}. {again}"
        )
    tensors, place = {}, 0
    for tensor, first, last in entries:
        fits = max(tensor.shape, default=0) <= size  # before they are multiplied
        if tensor.dtype in DTYPES:  # of another one the size is unknown
            fits = fits and tensor.nbytes == last - first
        if first != place or last < first or not fits:
            raise ValueError(
                f"{broken}: the bytes of {shown(tensor.name)} are not as many as its shape says, or leave a gap. "
                f"{again}"
            )
        tensors[tensor.name], place = tensor, last
    return tensors, metadata


def _tensor(name: str, info, path: Path, begin: int, broken: str) -> tuple[Tensor, int, int]:
    """A tensor of a header, and where its bytes start and end, counted from the header's end. All numbers are checked
    to fit 63 bits."""
    if len(name) > MAX_NAME or not _is_text(name):
        raise ValueError(f"{broken}: the name {shown(name)} is longer than {MAX_NAME} characters, or no text.")
    where = f"{broken}: {shown(name)}"
    if not isinstance(info, dict):
        raise ValueError(f"{where} is {shown(info)}, expected dtype, shape and data_offsets.")
    if others := info.keys() - set(ENTRY):
        raise ValueError(f"{where} has {first_few(sorted(others))} beside dtype, shape and data_offsets.")
    dtype, shape, offsets = map(info.get, ENTRY)
    if not isinstance(dtype, str):
        raise ValueError(f"{where} has the dtype {shown(dtype)}, expected a name.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise ValueError(f"{where} has the data_offsets {shown(offsets)}, expected where its bytes start and end.")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_is_count(n) for n in shape):
        raise ValueError(f"{where} has the shape {shown(shape)}, expected at most {MAX_AXES} sizes.")
    return Tensor(name, dtype, tuple(shape), begin + offsets[0], path), *offsets


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value) -> bool:
    """Whether it is a string without lone surrogates, which no other reader of the format accepts."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _place(entry: tuple[Tensor, int, int]) -> tuple:
    tensor, first, last = entry
    return first, last, tensor.name


class _Twice(Exception):
    """A header has some names twice."""


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _Twice(first_few(sorted(name for name, count in counts.items() if count > 1)))
    return result


def _fill(file, view: memoryview, path: Path):
    while view:
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{shown(path.name)} ended before its last tensor: it changed while it was read.")
        view = view[count:]


class Reader:
    """Reads files once from front to back, in a thread that hashes every byte on the way.

    A context manager, which ends the thread. `slices` must be called for every tensor of `files.tensors` in order, and
    each slice returned with `release`, because there are only BUFFERS buffers.
    """

    def __init__(self, files: TensorFiles):
        self.files = files
        self._digests: list[str] = []
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        self._full: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(min(BUFFERS, sum(-(-tensor.nbytes // SLICE) for tensor in files.tensors.values()))):
            self._free.put(bytearray(SLICE))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._free.put(None)  # wakes the thread if it waits for a buffer
        self._thread.join()

    def can_keep(self, tensor: Tensor) -> bool:
        """Whether all slices of the tensor can be in use at once and still leave buffers to read ahead."""
        return tensor.nbytes <= MOST_KEPT * SLICE

    def slices(self, tensor: Tensor) -> Iterator["Slice"]:
        """The tensor's slices in order. Raises any exception of the reading thread."""
        for _ in range(0, tensor.nbytes, SLICE):
            piece = self._full.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def release(self, piece: "Slice"):
        """Returns a slice's buffer, to be read into again."""
        self._free.put(piece.buffer)

    def digests(self) -> list[str]:
        """The SHA-256 of each file, once every slice has been taken."""
        self._thread.join()
        return self._digests

    def _run(self):
        try:
            for path in self.files.files:
                self._read(path)
        except Exception as e:  # raised where the slices are taken
            self._full.put(e)

    def _read(self, path: Path):
        digest = hashlib.sha256()
        with open_regular(path) as file:
            self.files.check_unchanged()  # so the header below is the one that was parsed
            header = bytearray(8 + int.from_bytes(file.read(8), "little"))
            file.seek(0)
            _fill(file, memoryview(header), path)
            digest.update(header)
            for tensor in [t for t in self.files.tensors.values() if t.file == path]:
                for begin in range(0, tensor.nbytes, SLICE):
                    buffer = self._free.get()
                    if self._stop.is_set():
                        return
                    piece = Slice(tensor, begin, buffer, min(SLICE, tensor.nbytes - begin))
                    _fill(file, piece.bytes, path)
                    digest.update(piece.bytes)
                    self._full.put(piece)
        self._digests.append(digest.hexdigest())


@dataclass(frozen=True)
class Slice:
    """`nbytes` bytes of a tensor, starting at its byte `begin`."""

    tensor: Tensor
    begin: int
    buffer: bytearray
    nbytes: int

    @property
    def bytes(self) -> memoryview:
        return memoryview(self.buffer)[: self.nbytes]

    @property
    def values(self) -> torch.Tensor:
        dtype = DTYPES[self.tensor.dtype]
        return torch.frombuffer(self.buffer, dtype=dtype, count=self.nbytes // dtype.itemsize)
