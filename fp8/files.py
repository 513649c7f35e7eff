"""Safetensors files read in slices, front to back, so that memory does not grow with the file."""

import collections
import hashlib
import json
import math
import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

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
BUFFERS = 128  # slices in memory, 268 MB; more than are held of one tensor and in work
HELD = 72  # slices of one tensor in memory, 150 MB; the largest FP8 weight of Wan 14B has 142 MB
MAX_HEADER = 100 * 2**20  # bytes, as the safetensors library allows
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `begin` bytes into `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    file: Path | None = None

    @property
    def count(self) -> int:
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

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def slices(self, tensor: Tensor, elements: int = SLICE // 4) -> Iterator[torch.Tensor]:
        """The tensor's values in order, flat, `elements` at a time."""
        dtype = DTYPES[tensor.dtype]
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(tensor.begin)
            for start in range(0, tensor.count, elements):
                buffer = bytearray(min(elements, tensor.count - start) * dtype.itemsize)
                _fill(file, memoryview(buffer))
                yield torch.frombuffer(buffer, dtype=dtype)


@dataclass(frozen=True)
class Progress:
    """How far the reading of some tensors is."""

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


OnProgress = Callable[[Progress], None]  # called after each slice; may raise, which ends the work


def open_files(path: str | Path) -> TensorFiles:
    """The tensors of a .safetensors file, or of the shards that a .safetensors.index.json names.

    Raises ValueError for anything else (a pickle, a truncated file, an index its shards do not bear out) and
    FileNotFoundError for missing shards.
    """
    path = Path(path)
    if path.is_dir() or SHARD.search(path.name):
        raise ValueError(
            f"{path.name} is {'a folder' if path.is_dir() else 'one shard of a model'}. Give the .safetensors "
            f"file, or for a model in shards its {INDEX_SUFFIX}."
        )
    if not path.name.endswith(INDEX_SUFFIX):
        tensors, metadata = read_header(path)
        _check_dtypes(path, tensors)
        return TensorFiles(path, (path,), tensors, metadata)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path.name} is not an index of shards ({e!r}). Download it again.") from e
    files = tuple(path.parent / name for name in names)
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path.name} names shards outside its own folder. Use the index that belongs to the shards.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path.name} names {len(files)} shards; of them {', '.join(missing)} is missing beside it. "
            "Download the missing ones."
        )
    tensors, metadata = {}, []
    for file in files:
        found, file_metadata = read_header(file)
        _check_dtypes(file, found)
        metadata.append(file_metadata)
        for name in found:
            if weight_map.get(name) != file.name:
                raise ValueError(
                    f"{file.name} holds {name}, which {path.name} places in {weight_map.get(name)}. Index "
                    "and shards do not belong together; download both again."
                )
        tensors |= found
    for name in weight_map:
        if name not in tensors:
            raise ValueError(
                f"{path.name} places {name} in {weight_map[name]}, which does not hold it. Index and shards "
                "do not belong together; download both again."
            )
    return TensorFiles(path, files, tensors, metadata[0])


def _check_dtypes(path: Path, tensors: dict[str, Tensor]):
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path.name}: {name} has the dtype {tensor.dtype}, which is not read here. Use a file whose "
                "weights are BF16, FP16, FP32 or FP8."
            )


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in the order of their bytes, and the metadata of a safetensors file, from its first bytes.

    Raises ValueError, naming the file, for anything that is not a whole safetensors file: a pickle, a truncated
    download, a broken header, tensors that do not fill the file without gap or overlap.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(PICKLE_STARTS):
            raise ValueError(
                f"{path.name} is a pickle (.pt, .pth, .bin or .ckpt), which can run code when it is read. "
                "Only safetensors files are read: download that version of the model."
            )
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            if start.startswith(b"<"):
                raise ValueError(f"{path.name} is a web page, not a model. Download the file itself.")
            raise ValueError(
                f"{path.name} is not a safetensors file: its header length is {length} bytes. Download it again."
            )
        begin = 8 + length
        if begin > size:
            raise ValueError(
                f"{path.name} is cut short: {size} bytes, but its header alone has {length}. Download it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata that is not text")
        places = sorted((*map(int, info["data_offsets"]), name) for name, info in header.items())
        tensors = {
            name: Tensor(name, str(header[name]["dtype"]), tuple(map(int, header[name]["shape"])), begin + first, path)
            for first, _, name in places
        }
        ends = [end for _, end, _ in places]
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path.name} is not a safetensors file: its header is not text ({e}). Download it again."
        ) from e
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path.name} is not a safetensors file: its header is not JSON ({e}). Download it again."
        ) from e
    except _Twice as e:
        raise ValueError(f"{path.name} holds {e} twice. Make the file again.") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{path.name} has a broken safetensors header ({e!r}). Download it again.") from e
    expected = begin + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path.name} has {size} bytes, its header promises {expected}: the file is "
            f"{'cut short' if size < expected else 'damaged'}. Download it again."
        )
    for tensor, previous, end in zip(tensors.values(), [0, *ends], ends):
        fits = tensor.dtype not in DTYPES or tensor.nbytes == end - previous
        if tensor.begin != begin + previous or min(tensor.shape, default=0) < 0 or not fits:
            raise ValueError(
                f"{path.name} has a broken safetensors header: the bytes of {tensor.name} are not as many "
                "as its shape says, or leave a gap. Download it again."
            )
    return tensors, metadata


class _Twice(ValueError):
    """Names that a header holds twice."""


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _Twice(", ".join(sorted(name for name, count in counts.items() if count > 1)))
    return result


def _fill(file, view: memoryview):
    while view:
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{Path(file.name).name} ended before its last tensor: it changed while it was read.")
        view = view[count:]


class Reader:
    """Reads files once from front to back, in a thread that hashes every byte on the way.

    Used as a context, which ends the thread. `slices` must be called for every tensor of `files.tensors` in order, and
    each slice handed back with `release`: there are `BUFFERS` of them.
    """

    def __init__(self, files: TensorFiles):
        self.files = files
        self._digests: list[str] = []
        self._free = queue.SimpleQueue()
        self._full = queue.SimpleQueue()
        for _ in range(min(BUFFERS, sum(-(-tensor.nbytes // SLICE) for tensor in files.tensors.values()))):
            self._free.put(bytearray(SLICE))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._free.put(None)  # wakes the thread where it waits for a buffer
        self._thread.join()

    def holds(self, tensor: Tensor) -> bool:
        """Whether all slices of the tensor can be out at once and leave room to read ahead."""
        return tensor.nbytes <= HELD * SLICE

    def slices(self, tensor: Tensor) -> Iterator["Slice"]:
        """The tensor's slices in order. Raises what the reading raised."""
        for _ in range(0, tensor.nbytes, SLICE):
            piece = self._full.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def release(self, piece: "Slice"):
        """Hands a slice's memory back, to be read into again."""
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
        with open(path, "rb", buffering=0) as file:
            header = bytearray(8 + int.from_bytes(file.read(8), "little"))
            file.seek(0)
            _fill(file, memoryview(header))
            digest.update(header)
            for tensor in [t for t in self.files.tensors.values() if t.file == path]:
                for begin in range(0, tensor.nbytes, SLICE):
                    buffer = self._free.get()
                    if self._stop.is_set():
                        return
                    piece = Slice(tensor, begin, buffer, min(SLICE, tensor.nbytes - begin))
                    _fill(file, piece.bytes)
                    digest.update(piece.bytes)
                    self._full.put(piece)
        self._digests.append(digest.hexdigest())


@dataclass(frozen=True)
class Slice:
    """`nbytes` bytes of a tensor, from its byte `begin` on."""

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
