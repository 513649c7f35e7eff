"""Makes a scaled-FP8 file from a BF16 one: read once, in slices, and never left half written."""

import bisect
import collections
import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .files import DTYPES, OnProgress, Progress, Reader, Slice, Tensor, TensorFiles, open_files
from .recipe import CONVS, FP8, MARKER, SCALE_SUFFIX, SCALE_SUFFIXES, encode, find_scale, is_quantised, scale_name
from .report import Report, WeightError, saturation

try:
    import fcntl
except ImportError:  # Windows, which locks open files by itself
    fcntl = None

FORMAT_VERSION = "1"
TOOL_VERSION = re.search(r'^version = "(.+)"$', (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.M)[1]
TEMPORARY = ".safetensors.cooking"  # what an unfinished file's name ends in
SOURCES = ("BF16", "F16", "F32")
WORKERS = 2  # threads that survey and encode: they keep up with the one that reads and hashes
AHEAD = 2 * WORKERS  # slices in work
SECONDS_BETWEEN_SYNCS = 0.2


@dataclass(frozen=True)
class Options:
    """recipe: "default" or "published". convs: "fp8", "bf16", or None for what the recipe does."""

    recipe: str = "default"
    convs: str | None = None

    def __post_init__(self):
        if self.recipe not in CONVS:
            raise ValueError(f"recipe is {self.recipe!r}, expected one of {', '.join(CONVS)}")
        if self.convs is None:
            object.__setattr__(self, "convs", CONVS[self.recipe])
        if self.convs not in CONVS.values():
            raise ValueError(f"convs is {self.convs!r}, expected fp8 or bf16")


# The layout of the result


def plan(tensors: Iterable[Tensor], convs: str) -> dict[str, Tensor]:
    """The tensors of the cooked file, `begin` counted from the end of its header.

    BF16 comes before FP8, so that every tensor is aligned to its dtype without gaps, which the format does not allow;
    within each the source's order is kept.
    """
    bf16 = [(MARKER, ())]
    fp8 = []
    for tensor in tensors:
        if is_quantised(tensor.name, tensor.shape, convs):
            fp8.append((tensor.name, tensor.shape))
            bf16.append((scale_name(tensor.name), ()))
        else:
            bf16.append((tensor.name, tensor.shape))
    layout, begin = {}, 0
    for dtype, entries in (("BF16", bf16), ("F8_E4M3", fp8)):
        for name, shape in entries:
            layout[name] = Tensor(name, dtype, tuple(shape), begin)
            begin += layout[name].nbytes
    return layout


def header(layout: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The safetensors header of a layout, its length in front, padded to 8 bytes."""
    entries = {
        name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.begin, t.begin + t.nbytes]}
        for name, t in layout.items()
    }
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_metadata(options: Options, config: str | None, digests: list[str]) -> dict[str, str]:
    """Where the file comes from. `source_sha256` is the source's, or its shards' in the order of their names."""
    metadata = {
        "format": "pt",
        "format_version": FORMAT_VERSION,
        "recipe": options.recipe,
        "convs": options.convs,
        "tool": "comfyui-worldstereo-fp8",
        "tool_version": TOOL_VERSION,
        "source_sha256": " ".join(digests),
    }
    return metadata if config is None else metadata | {"config": config}


# Refusals


Refusal = Callable[[str], str | None]


def check(files: TensorFiles, options: Options, refusal: Refusal):
    """Raises ValueError for a source that the recipe must not or cannot be used on.

    refusal: why the recipe was not made for a tensor of this name, or None.
    """
    where = files.path.name
    if not files.tensors:
        raise ValueError(f"{where} holds no tensors. Choose the BF16 model.")
    for name, tensor in files.tensors.items():
        if tensor.dtype.startswith("F8") or name == MARKER or name.endswith(tuple("." + s for s in SCALE_SUFFIXES)):
            raise ValueError(
                f"{where} is FP8 already: it holds {name} ({tensor.dtype}). The source is the BF16 model "
                "that it was made from."
            )
    for name, tensor in files.tensors.items():
        if reason := refusal(name):
            raise ValueError(f"{where}: {name} {reason}")
        if tensor.dtype not in SOURCES:
            raise ValueError(f"{where}: {name} is {tensor.dtype}. The weights of a source are BF16, FP16 or FP32.")
        if not tensor.count:
            raise ValueError(
                f"{where}: {name} has the shape {list(tensor.shape)}, no element at all. The file is damaged; "
                "download it again."
            )
    if not any(is_quantised(t.name, t.shape, options.convs) for t in files.tensors.values()):
        raise ValueError(
            f"{where}: none of its {len(files.tensors)} tensors is a weight that the recipe turns into FP8. "
            "It is no model that this recipe was made for."
        )


# Values


Emit = Callable[[str, int, memoryview], None]  # takes a tensor's name, a byte offset in it, and the bytes from there


@dataclass
class _Cooking:
    """Turns the tensors of a source, one after the other, into the bytes of the result.

    The bytes are the same on every device: each value is an IEEE division and a rounding to nearest even, and the
    scale follows from sums of integers.
    """

    reader: Reader
    pool: ThreadPoolExecutor
    options: Options
    device: torch.device
    emit: Emit
    on_slice: Callable[[int], None]  # called with the bytes of each slice read
    errors: list[WeightError] = field(default_factory=list)
    published: list[WeightError] = field(default_factory=list)

    def run(self):
        self.emit(MARKER, 0, memoryview(bytes(2)))
        for tensor in self.reader.files.tensors.values():
            if is_quantised(tensor.name, tensor.shape, self.options.convs):
                self._quantise(tensor)
            else:
                self._keep(tensor)

    def _keep(self, tensor: Tensor):
        begin = 0
        for piece, values in self._in_order(_keep, self.reader.slices(tensor)):
            if values is None:
                raise _not_finite(tensor)
            self._send(tensor.name, begin, values)
            begin += values.numel()
            self.reader.release(piece)
            self.on_slice(piece.nbytes)

    def _quantise(self, tensor: Tensor):
        """Surveys the values as they are read, finds the scale, then encodes the slices: those still in memory, or, of
        a tensor too large for that, read from the file once more."""
        survey, merge = (_largest, torch.maximum) if tensor.dtype == "F32" else (_histogram, torch.add)
        held, found = [], None
        for piece, result in self._in_order(
            lambda piece: survey(piece.values.to(self.device)), self.reader.slices(tensor)
        ):
            found = result if found is None else merge(found, result, out=found)
            if self.reader.holds(tensor):
                held.append(piece)
            else:
                self.reader.release(piece)
            self.on_slice(piece.nbytes)

        def again() -> Iterator[torch.Tensor]:
            return (piece.values for piece in held) if held else self.reader.files.slices(tensor)

        if tensor.dtype == "F32":
            amax = found
            samples = lambda: ((values.to(self.device), 1) for values in again())
        else:
            occurring = found.nonzero().squeeze(1)
            table = occurring.to(torch.int16).view(DTYPES[tensor.dtype]).float()
            amax = table.max()  # NaN if one is NaN
            samples = lambda: [(table, found[occurring])]
        if not torch.isfinite(amax):
            raise _not_finite(tensor)

        divisor, scale = find_scale(amax, samples(), self.options.recipe)
        self._send(scale_name(tensor.name), 0, scale.cpu())
        self.errors.append(_error(tensor, samples(), divisor, scale))
        if self.options.recipe != "published":
            self.published.append(_error(tensor, samples(), *find_scale(amax, samples(), "published")))
        divisor = divisor.to(self.device)

        def encode_in_place(values: torch.Tensor) -> torch.Tensor:  # into the memory of the slice, which is done with
            return values.view(FP8)[: values.numel()].copy_(encode(values.to(self.device), divisor))

        begin = 0
        for _, values in self._in_order(encode_in_place, again()):
            self._send(tensor.name, begin, values)
            begin += values.numel()
        for piece in held:
            self.reader.release(piece)

    def _in_order(self, function: Callable, items: Iterable) -> Iterator[tuple]:
        """(item, function(item)) in order, some of them computed ahead in other threads."""
        ahead = collections.deque()
        for item in items:
            ahead.append((item, self.pool.submit(function, item)))
            if len(ahead) > AHEAD:
                item, future = ahead.popleft()
                yield item, future.result()
        for item, future in ahead:
            yield item, future.result()

    def _send(self, name: str, begin: int, values: torch.Tensor):
        data = (ctypes.c_char * values.nbytes).from_address(values.data_ptr())
        self.emit(name, begin * values.itemsize, memoryview(data).cast("B"))


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().max()  # NaN if one is NaN


def _histogram(values: torch.Tensor) -> torch.Tensor:
    """How often each of the 32768 magnitudes of a 16-bit dtype occurs, int64: all there is to know of a weight's error.

    A magnitude's bits, without the sign, are its place in the result.
    """
    return torch.bincount(values.view(torch.int16).bitwise_and(0x7FFF), minlength=2**15).cpu()


def _keep(piece: Slice) -> torch.Tensor | None:
    """A slice that is not quantised, in BF16; None where it is not finite."""
    values = piece.values.to(torch.bfloat16)
    return values if all(torch.isfinite(extreme) for extreme in values.aminmax()) else None


def _not_finite(tensor: Tensor) -> ValueError:
    return ValueError(
        f"{tensor.file.name}: {tensor.name} holds NaN or infinite values. The file is damaged; download it again."
    )


def _error(tensor: Tensor, samples, divisor: torch.Tensor, scale: torch.Tensor) -> WeightError:
    error = WeightError(tensor.name, tensor.count, scale.item())
    limit = scale.item() * saturation(FP8)
    for values, counts in samples:
        error.add(values, encode(values, divisor).double() * scale.double(), counts, limit)
    return error


def _produce(
    files: TensorFiles, options: Options, device: torch.device | None, emit: Emit, on_progress: OnProgress | None
) -> tuple[list[str], _Cooking]:
    """Runs a whole source through the recipe. Returns the SHA-256 of its files, and the cooking with the errors."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, done = time.monotonic(), 0

    def on_slice(nbytes: int):
        nonlocal done
        done += nbytes
        if on_progress is not None:
            tensors = bisect.bisect_right(ends, done)
            on_progress(Progress(done, files.nbytes, tensors, len(files.tensors), time.monotonic() - started))

    ends = list(itertools.accumulate(tensor.nbytes for tensor in files.tensors.values()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # slices run in parallel here, not the elements of one
    try:
        with (
            Reader(files) as reader,
            ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            cooking = _Cooking(reader, pool, options, device, emit, on_slice)
            cooking.run()
            return reader.digests(), cooking
    finally:
        torch.set_num_threads(threads)


# The result's file


@contextlib.contextmanager
def _new_file(path: Path, nbytes: int, overwrite: bool):
    """A file that appears under `path` whole, synced and at once when the context ends well, and not at all otherwise.

    Until then it is beside `path` under a name ending in `TEMPORARY`. What a killed run left there is removed first.
    """
    if not path.name.endswith(".safetensors"):
        raise ValueError(f"The result {path.name} must have a name that ends in .safetensors.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} for the result. Make it, or choose another.")
    _refuse_to_overwrite(path, overwrite)
    _remove_abandoned(path.parent)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise OSError(
            f"{path.name} needs {nbytes / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free. Make room, "
            "or choose another folder."
        )
    temporary = path.with_name(path.name.removesuffix(".safetensors") + TEMPORARY)
    try:
        file = open(temporary, "xb")
    except FileExistsError as e:
        raise FileExistsError(f"{path.name} is being cooked already: another run holds {temporary.name}.") from e
    with file:
        # Another run may have taken the file for an abandoned one before it was locked.
        if not (_lock(file) and _is_at(file, temporary)):
            raise FileExistsError(f"{path.name} is being cooked already by another run. Wait for it.")
        try:
            with _written_out(file):
                yield file
            file.flush()
            os.fsync(file.fileno())
            _refuse_to_overwrite(path, overwrite)
            if fcntl is not None:
                os.replace(temporary, path)  # while it is locked
        except BaseException:
            if fcntl is None:
                file.close()  # Windows removes and renames no open file
            temporary.unlink(missing_ok=True)
            raise
    if fcntl is None:
        os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name itself is on disk once the folder is synced; Windows has no such call
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def _written_out(file):
    """Has the system write the file out while it grows, so that the sync at its end has little left to wait for."""
    stop = threading.Event()

    def run():
        while not stop.wait(SECONDS_BETWEEN_SYNCS):
            os.fsync(file.fileno())

    with ThreadPoolExecutor(1) as pool:
        syncs = pool.submit(run)
        try:
            yield
        finally:
            stop.set()
        syncs.result()  # the system reports a failed write once, to whichever sync comes next


def _refuse_to_overwrite(path: Path, overwrite: bool):
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path.name} exists already. Choose another name, or allow overwriting.")


def _lock(file) -> bool:
    """Locks a temporary for as long as it is open; False where another process has it. Windows needs no lock."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(file, path: Path) -> bool:
    """Whether an open file is the one that has this path."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _remove_abandoned(folder: Path):
    for temporary in folder.glob("*" + TEMPORARY):
        with open(temporary, "rb") as file:
            abandoned = _lock(file)
        if abandoned:
            with contextlib.suppress(PermissionError):  # Windows: another process has it open
                temporary.unlink()


# What this module is for


FindConfig = Callable[[Path, dict[str, str]], str | None]  # of a source's path and metadata


def cook(
    source: str | Path,
    target: str | Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    find_config: FindConfig = lambda path, metadata: metadata.get("config"),
    refusal: Refusal = lambda name: None,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Writes the scaled-FP8 file of a source. The same source and options give the same bytes everywhere.

    Memory stays below 2 GB whatever the size. Until it is finished the result has another name; on any exception, one
    that `on_progress` raises included, nothing of it is left, and the source is only ever read.

    Args:
        source: .safetensors with BF16, FP16 or FP32 weights, or the .safetensors.index.json of its shards.
        target: .safetensors to write.
        find_config: gives the text of the model's configuration, or None, for the source's path and metadata.
        refusal: see `check`.
        device: for the arithmetic; CUDA if there is one.

    Raises:
        ValueError: the source cannot be cooked; says why and what to do.
        FileExistsError: the target exists and `overwrite` is false, or another run is making it.
        OSError: no room, or the disk failed.
    """
    files, target = open_files(source), Path(target)
    check(files, options, refusal)
    if any(target.exists() and file.samefile(target) for file in files.files):
        raise ValueError(f"{target.name} is the source itself. Choose another name for the result.")
    config = find_config(files.path, files.metadata)
    layout = plan(files.tensors.values(), options.convs)
    # The source's hash is known at the end and stands at the beginning, so the header is written last, in the room
    # that one with a hash of zeros takes.
    room = len(header(layout, make_metadata(options, config, ["0" * 64] * len(files.files))))
    nbytes = room + sum(tensor.nbytes for tensor in layout.values())
    started = time.monotonic()
    with _new_file(target, nbytes, overwrite) as file:

        def emit(name: str, begin: int, data: memoryview):
            file.seek(room + layout[name].begin + begin)
            file.write(data)

        digests, cooking = _produce(files, options, device, emit, on_progress)
        file.seek(0)
        file.write(header(layout, make_metadata(options, config, digests)))
    seconds = time.monotonic() - started
    quantised = len(cooking.errors)
    heading = [
        ("source", f"{files.path.name}, {len(files.tensors)} tensors, {files.nbytes / 1e9:.2f} GB"),
        ("source SHA-256", " ".join(digests)),
        ("result", f"{target.name}, {len(layout)} tensors, {quantised} of them FP8, {nbytes / 1e9:.2f} GB"),
        ("recipe", f"{options.recipe}, convolutions {options.convs}, format {FORMAT_VERSION}, tool {TOOL_VERSION}"),
        ("config.json", "none" if config is None else "in the metadata"),
        ("time", f"{seconds:.1f} s, {files.nbytes / seconds / 1e6:.0f} MB/s"),
    ]
    return Report(heading, cooking.errors, cooking.published)


def verify(
    path: str | Path,
    source: str | Path,
    options: Options | None = None,
    *,
    refusal: Refusal = lambda name: None,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """How a scaled-FP8 file differs from what its source and recipe give, a line for each tensor; empty if it does not.

    Args:
        options: None takes those of the file's metadata, or for a file without them the published recipe, with the
            convolutions as the file has them.

    Raises ValueError where either file cannot be read or the source cannot be cooked.
    """
    files, found = open_files(source), open_files(path)
    if options is None:
        convs = any(t.dtype == "F8_E4M3" and len(t.shape) > 2 for t in found.tensors.values())
        options = Options(
            found.metadata.get("recipe", "published"), found.metadata.get("convs", "fp8" if convs else "bf16")
        )
    check(files, options, refusal)
    layout = plan(files.tensors.values(), options.convs)
    held = {name: name for name in found.tensors}
    for name in found.tensors:  # the other name a scale may have
        held.setdefault(name.removesuffix(f"weight.{SCALE_SUFFIX}") + SCALE_SUFFIX, name)
    differences = [f"{name} is missing" for name in layout if name not in held]
    expected = {held[name]: tensor for name, tensor in layout.items() if name in held}
    for name, tensor in found.tensors.items():
        if name not in expected:
            differences.append(f"{name} does not belong to the recipe's result")
        elif tensor.dtype != expected[name].dtype or (tensor.shape != expected[name].shape and tensor.shape != (1,)):
            differences.append(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the recipe makes it "
                f"{expected[name].dtype} {list(expected[name].shape)}"
            )
            del expected[name]
    changes: dict[str, _Change] = {}
    with open(path, "rb") as file:

        def compare(name: str, begin: int, data: memoryview):
            tensor = found.tensors.get(held.get(name))
            if tensor is None or tensor.name not in expected:
                return
            file.seek(tensor.begin + begin)
            there = file.read(len(data))
            if there != data:
                changes.setdefault(tensor.name, _Change()).add(there, data, DTYPES[tensor.dtype])

        digests, _ = _produce(files, options, device, compare, on_progress)
    differences += [
        f"{name}: {change.count} of {found.tensors[name].count} values differ, by at most {change.largest:.6g} "
        f"(file {change.there:.6g}, recipe {change.here:.6g})"
        for name, change in changes.items()
    ]
    named = found.metadata.get("source_sha256")
    if named not in (None, " ".join(digests)):
        differences.append(
            f"The file was made from a source with the SHA-256 {named}; this one has {' '.join(digests)}"
        )
    return differences


@dataclass
class _Change:
    """Stored values of one tensor that differ: how many, and the pair farthest apart."""

    count: int = 0
    largest: float = 0.0
    there: float = 0.0
    here: float = 0.0

    def add(self, there: bytes, here: memoryview, dtype: torch.dtype):
        stored = [torch.frombuffer(bytearray(data), dtype=dtype) for data in (there, here)]
        bits = [values.view(torch.uint8).reshape(values.numel(), -1) for values in stored]
        self.count += int((bits[0] != bits[1]).any(1).sum())
        distance = (stored[0].double() - stored[1].double()).abs()
        if distance.max() >= self.largest:
            i = distance.argmax()
            self.largest, self.there, self.here = (float(v) for v in (distance[i], stored[0][i], stored[1][i]))
