"""Makes an FP8 or INT8 file from a BF16 one, which is read once, in slices. An unfinished result is never left
behind."""

import bisect
import collections
import ctypes
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import naming, new_large_file, refuse_taken
from ..files.regular import open_regular
from ..files.text import shown
from . import int8
from .files import DTYPES, SHARD, OnProgress, Progress, Reader, Slice, Tensor, TensorFiles, open_files
from .recipe import (
    COMFY_QUANT,
    CONVS,
    FP8,
    MARKER,
    SCALE_SUFFIX,
    SCALE_SUFFIXES,
    encode,
    find_scale,
    is_quantised,
    is_side_tensor,
    scale_name,
)
from .report import Report, WeightError, saturation
from .rotation import GROUP

FORMAT_VERSION = "1"
TOOL_VERSION = re.search(r'^version = "(.+)"$', (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
SOURCES = ("BF16", "F16", "F32")
WORKERS = 2  # threads that survey and encode: enough to keep up with the one that reads and hashes
AHEAD = 2 * WORKERS  # slices being worked on


FROM_FP8 = (
    "The source is FP8. The relative error of a Linear will be about 3.0e-2; made from the BF16 model it would be "
    "1.4e-2. Use the BF16 model if you can."
)


@dataclass(frozen=True)
class Options:
    """recipe: "default", "published" or "int8". convs: "fp8", "bf16", or None for the recipe's own choice. group: how
    many channels of INT8 weights are rotated together. Raises ValueError for any other value."""

    recipe: str = "default"
    convs: str | None = None
    group: int = GROUP

    def __post_init__(self):
        if self.recipe not in CONVS:
            raise ValueError(f"recipe is {shown(self.recipe)}, expected one of {', '.join(CONVS)}")
        if self.convs is None:
            object.__setattr__(self, "convs", CONVS[self.recipe])
        if self.convs not in CONVS.values():
            raise ValueError(f"convs is {shown(self.convs)}, expected fp8 or bf16")
        if self.recipe == "int8" and self.convs != "bf16":
            raise ValueError("The recipe int8 leaves convolutions in BF16. Leave convs to the recipe.")

    def quantises(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor of this diffusers name and shape is quantised."""
        if self.recipe == "int8":
            return int8.is_int8(name, shape, self.group)
        return is_quantised(name, shape, self.convs)  # type: ignore[arg-type]  # set by __post_init__


# The layout of the result


def plan(tensors: Iterable[Tensor], options: Options) -> dict[str, Tensor]:
    """The tensors of the cooked file, `begin` counted from the end of its header.

    Wider dtypes come first, so that every tensor is aligned to its dtype without gaps, which the format does not allow.
    Within each dtype the source's order is kept.
    """
    entries: dict[str, list[tuple[str, tuple[int, ...]]]] = {"F32": [], "BF16": [], "F8_E4M3": [], "I8": [], "U8": []}
    if options.recipe != "int8":
        entries["BF16"].append((MARKER, ()))
    for tensor in tensors:
        if not options.quantises(tensor.name, tensor.shape):
            entries["BF16"].append((tensor.name, tensor.shape))
        elif options.recipe == "int8":
            layer = tensor.name.removesuffix("weight")
            entries["I8"].append((tensor.name, tensor.shape))
            entries["F32"].append((layer + int8.SCALE_SUFFIX, (tensor.shape[0], 1)))
            entries["U8"].append((layer + COMFY_QUANT, (len(int8.description(options.group)),)))
        else:
            entries["F8_E4M3"].append((tensor.name, tensor.shape))
            entries["BF16"].append((scale_name(tensor.name), ()))
    layout, begin = {}, 0
    for dtype, of_dtype in entries.items():
        for name, shape in of_dtype:
            layout[name] = Tensor(name, dtype, tuple(shape), begin)
            begin += layout[name].nbytes
    return layout


def header(layout: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The safetensors header of a layout: its length in 8 bytes, then the JSON, padded to a multiple of 8 bytes."""
    entries = {
        name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.begin, t.begin + t.nbytes]}
        for name, t in layout.items()
    }
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_metadata(options: Options, config: str | None, digests: list[str]) -> dict[str, str]:
    """The metadata of the cooked file. `source_sha256` is that of the source, or of its shards in the order of their
    names."""
    metadata: dict = {
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


def weights_of(files: TensorFiles, options: Options) -> list[Tensor]:
    """The tensors of a source that go into the result. Any others describe the source's own format."""
    return [t for t in files.tensors.values() if options.recipe != "int8" or not is_side_tensor(t.name)]


def fp8_scale(files: TensorFiles, tensor: Tensor) -> float | None:
    """The scale of a source's FP8 weight; None for a weight that is not FP8. Raises ValueError for an FP8 weight
    without one."""
    if tensor.dtype != "F8_E4M3":
        return None
    names = [tensor.name.removesuffix("weight") + suffix for suffix in SCALE_SUFFIXES]
    found = [files.tensors[name] for name in names if name in files.tensors]
    if not found or found[0].count != 1:
        raise ValueError(
            f"{shown(files.path.name)}: {shown(tensor.name)} is FP8 but has no scale of one number "
            f"({shown(names[1])}): its values cannot be restored. Choose the BF16 model."
        )
    return next(files.slices(found[0])).float().item()


def check(files: TensorFiles, options: Options, refusal: Refusal) -> None:
    """Raises ValueError for a source that the recipe cannot or must not be applied to.

    refusal: a function of a tensor's name that returns why the recipe does not apply to it, or None.
    """
    where = shown(files.path.name)
    if not files.tensors:
        raise ValueError(f"{where} holds no tensors. Choose the BF16 model.")
    for name, tensor in files.tensors.items():
        if options.recipe == "int8":
            fp8_scale(files, tensor)
        elif tensor.dtype.startswith("F8") or name == MARKER or name.endswith(tuple("." + s for s in SCALE_SUFFIXES)):
            raise ValueError(
                f"{where} is FP8 already: it holds {shown(name)} ({tensor.dtype}). The source is the BF16 model "
                "that it was made from."
            )
    for tensor in weights_of(files, options):
        name = tensor.name
        if reason := refusal(name):
            raise ValueError(f"{where}: {shown(name)} {reason}")
        if tensor.dtype not in SOURCES and not (options.recipe == "int8" and tensor.dtype == "F8_E4M3"):
            raise ValueError(
                f"{where}: {shown(name)} is {tensor.dtype}. The weights of a source are BF16, FP16 or FP32."
            )
        if not tensor.count:
            raise ValueError(
                f"{where}: {shown(name)} has the shape {list(tensor.shape)} and is empty. The file is damaged; "
                "download it again."
            )
    if not any(options.quantises(t.name, t.shape) for t in files.tensors.values()):
        raise ValueError(
            f"{where}: none of its {len(files.tensors)} tensors is a weight that the recipe quantises. "
            "The recipe was not made for this model."
        )


# Values


Emit = Callable[[str, int, memoryview], None]  # takes a tensor's name, a byte offset in it, and the bytes from there


@dataclass
class _Cooking:
    """Turns the tensors of a source, one after the other, into the bytes of the result.

    The bytes are the same on every device: each value is the result of one IEEE division and one rounding to nearest
    even, and the scale is found from sums of integers.
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
        if self.options.recipe != "int8":
            self.emit(MARKER, 0, memoryview(bytes(2)))
        wanted = {tensor.name for tensor in weights_of(self.reader.files, self.options)}
        for tensor in self.reader.files.tensors.values():
            if tensor.name not in wanted:
                self._pass_over(tensor)
            elif not self.options.quantises(tensor.name, tensor.shape):
                self._keep(tensor)
            elif self.options.recipe == "int8":
                self._quantise_int8(tensor)
            else:
                self._quantise(tensor)

    def _pass_over(self, tensor: Tensor):
        for piece in self.reader.slices(tensor):
            self.reader.release(piece)
            self.on_slice(piece.nbytes)

    def _keep(self, tensor: Tensor):
        begin, scale = 0, fp8_scale(self.reader.files, tensor)
        for piece, values in self._in_order(lambda piece: _keep(piece, scale), self.reader.slices(tensor)):
            if values is None:
                raise _not_finite(tensor)
            self._send(tensor.name, begin, values)
            begin += values.numel()
            self.reader.release(piece)
            self.on_slice(piece.nbytes)

    def _quantise(self, tensor: Tensor):
        """Surveys the values as they are read, finds the scale, then encodes the slices. A tensor too large to stay in
        memory is read from the file a second time."""
        survey, merge = (_largest, torch.maximum) if tensor.dtype == "F32" else (_histogram, torch.add)
        pieces: list = []
        found: Any = None
        samples: Callable[[], Iterable]
        for piece, result in self._in_order(
            lambda piece: survey(piece.values.to(self.device)), self.reader.slices(tensor)
        ):
            found = result if found is None else merge(found, result, out=found)
            if self.reader.can_keep(tensor):
                pieces.append(piece)
            else:
                self.reader.release(piece)
            self.on_slice(piece.nbytes)

        def again() -> Iterator[torch.Tensor]:
            return (piece.values for piece in pieces) if pieces else self.reader.files.slices(tensor)

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

        def encode_in_place(values: torch.Tensor) -> torch.Tensor:
            """Encodes into the slice's own memory."""
            return values.view(FP8)[: values.numel()].copy_(encode(values.to(self.device), divisor))

        begin = 0
        for _, values in self._in_order(encode_in_place, again()):
            self._send(tensor.name, begin, values)
            begin += values.numel()
        for piece in pieces:
            self.reader.release(piece)

    def _quantise_int8(self, tensor: Tensor):
        """Each row has its own scale, so one pass over whole rows is enough."""
        layer, row, group = tensor.name.removesuffix("weight"), 0, self.options.group
        self.emit(layer + COMFY_QUANT, 0, memoryview(int8.description(group)))
        error = WeightError(tensor.name, tensor.count, 0.0)

        def encode_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, WeightError]:
            rows = rows.to(self.device)
            values, scale = int8.quantise_weight(rows, group)
            found = WeightError(tensor.name, rows.numel(), scale.max().item())
            found.add(rows, int8.dequantise(values, scale, torch.float32, group).double())
            return values.cpu(), scale.cpu(), found

        for _, (values, scale, found) in self._in_order(encode_rows, self._rows(tensor)):
            if not torch.isfinite(scale).all():
                raise _not_finite(tensor)
            self._send(layer + int8.SCALE_SUFFIX, row, scale)
            self._send(tensor.name, row * tensor.shape[1], values)
            row += len(values)
            error.merge(found)
            error.scale = max(error.scale, found.scale)
        self.errors.append(error)

    def _rows(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        """The tensor's values in FP32, [rows, K], a few whole rows at a time."""
        width, scale = tensor.shape[1], fp8_scale(self.reader.files, tensor)
        begun = torch.empty(0)
        for piece in self.reader.slices(tensor):
            values = torch.cat([begun, piece.values.float() if scale is None else piece.values.float() * scale])
            self.reader.release(piece)
            self.on_slice(piece.nbytes)
            whole = values.numel() // width * width
            begun = values[whole:]
            if whole:
                yield values[:whole].view(-1, width)

    def _in_order(self, function: Callable, items: Iterable) -> Iterator[tuple]:
        """Yields (item, function(item)) in order, while other threads work a few items ahead."""
        ahead: collections.deque = collections.deque()
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
    """How often each of the 32768 magnitudes of a 16-bit dtype occurs, int64 [32768], which determines a weight's
    error.

    The index of a magnitude is its bits without the sign.
    """
    return torch.bincount(values.view(torch.int16).bitwise_and(0x7FFF), minlength=2**15).cpu()


def _keep(piece: Slice, scale: float | None) -> torch.Tensor | None:
    """A slice in BF16, without quantising it, or restored from FP8 with its scale; None if it is not finite."""
    values = (piece.values if scale is None else piece.values.float() * scale).to(torch.bfloat16)
    return values if all(torch.isfinite(extreme) for extreme in values.aminmax()) else None


def _not_finite(tensor: Tensor) -> ValueError:
    return ValueError(
        f"{shown(tensor.file.name)}: {shown(tensor.name)} holds NaN or infinite values. The file is damaged; download "
        "it again."
    )


def _error(tensor: Tensor, samples, divisor: torch.Tensor, scale: torch.Tensor) -> WeightError:
    error = WeightError(tensor.name, tensor.count, scale.item())
    limit = scale.item() * saturation(FP8)
    for values, counts in samples:
        error.add(values, encode(values, divisor).double() * scale.double(), counts, limit)
    return error


def cooking_device(device: torch.device) -> torch.device:
    """The device for the arithmetic where ComfyUI computes on `device`: `device` if it is CUDA, else the CPU (MPS has
    no float8)."""
    return device if device.type == "cuda" else torch.device("cpu")


def _produce(
    files: TensorFiles, options: Options, device: torch.device | None, emit: Emit, on_progress: OnProgress | None
) -> tuple[list[str], _Cooking]:
    """Runs a whole source through the recipe. Returns the SHA-256 of its files, and the cooking, which has the
    errors."""
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
            digests = reader.digests()
            files.check_unchanged()
            return digests, cooking
    finally:
        torch.set_num_threads(threads)


# The result's file


def check_target(target: Path, overwrite: bool) -> None:
    """Raises, before any work is done, for a result that could not be written or that ComfyUI would not list as a
    model: ValueError, FileNotFoundError for a missing folder, FileExistsError for a name that is taken."""
    name = shown(target.name)
    if not target.name.endswith(".safetensors"):
        raise ValueError(f"The result {name} must have a name that ends in .safetensors.")
    if SHARD.search(target.name):
        raise ValueError(f"{name} is the name of one shard of a model. Choose another name for the result.")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {shown(target.parent)} for the result. Create it, or choose another."
        )
    refuse_taken(target, overwrite)


# The public functions


FindConfig = Callable[[TensorFiles], str | None]  # the text of a source's configuration


def cook(
    source: str | Path,
    target: str | Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    find_config: FindConfig = lambda files: files.metadata.get("config"),
    refusal: Refusal = lambda name: None,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Writes the FP8 or INT8 file of a source. The same source and options give the same bytes on every machine.

    Memory stays below 2 GB for a model of any size. Until it is finished the result has a temporary name; after an
    exception, including one that `on_progress` raises, nothing of it is left. The source is only read.

    Args:
        source: .safetensors with BF16, FP16 or FP32 weights, or the .safetensors.index.json of its shards. The recipe
            int8 accepts scaled FP8 too, with a warning that says what accuracy that costs.
        target: .safetensors to write.
        find_config: gives the text of the source's configuration, or None.
        refusal: see `check`.
        device: for the arithmetic; CUDA if there is one.

    Raises:
        ValueError: the source cannot be cooked; says why and what to do.
        FileNotFoundError: the source, one of its shards or the target's folder does not exist.
        FileExistsError: the target exists and `overwrite` is false, or another run is making it.
        OSError: the disk is full or failed; or the finished file could not take its name, and the message gives the
            name it has.
    """
    files, target = open_files(source), Path(target)
    check(files, options, refusal)
    check_target(target, overwrite)
    if any(target.exists() and file.samefile(target) for file in files.files):
        raise ValueError(f"{shown(target.name)} is the source itself. Choose another name for the result.")
    config = find_config(files)
    layout = plan(weights_of(files, options), options)
    from_fp8 = [FROM_FP8] if any(tensor.dtype == "F8_E4M3" for tensor in files.tensors.values()) else []
    for warning in from_fp8:
        logging.warning(warning)
    # The header contains the source's hash, which is known only at the end, so it is written last. Until then it has
    # the room that one with a hash of zeros takes.
    room = len(header(layout, make_metadata(options, config, ["0" * 64] * len(files.files))))
    nbytes = room + sum(tensor.nbytes for tensor in layout.values())
    started = time.monotonic()
    with new_large_file(target, nbytes, overwrite) as file:

        def emit(name: str, begin: int, data: memoryview):
            with naming(target):
                file.seek(room + layout[name].begin + begin)
                file.write(data)

        digests, cooking = _produce(files, options, device, emit, on_progress)
        with naming(target):
            file.seek(0)
            file.write(header(layout, make_metadata(options, config, digests)))
    seconds = time.monotonic() - started
    quantised = f"{len(cooking.errors)} of them {'INT8' if options.recipe == 'int8' else 'FP8'}"
    heading = [
        ("source", f"{shown(files.path.name)}, {len(files.tensors)} tensors, {files.nbytes / 1e9:.2f} GB"),
        ("source SHA-256", " ".join(digests)),
        ("result", f"{shown(target.name)}, {len(layout)} tensors, {quantised}, {nbytes / 1e9:.2f} GB"),
        ("recipe", f"{options.recipe}, convolutions {options.convs}, format {FORMAT_VERSION}, tool {TOOL_VERSION}"),
        ("config.json", "none" if config is None else "in the metadata"),
        ("time", f"{seconds:.1f} s, {files.nbytes / seconds / 1e6:.0f} MB/s"),
    ]
    return Report(heading, cooking.errors, cooking.published, notes=from_fp8)


def verify(
    path: str | Path,
    source: str | Path,
    options: Options | None = None,
    *,
    refusal: Refusal = lambda name: None,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """How a cooked file differs from what its source and recipe give, one line per tensor; empty if it does not differ.

    Args:
        options: None for those in the file's metadata or, for a file without them, the published recipe, with
            convolutions as the file has them.

    Raises ValueError if either file cannot be read or the source cannot be cooked, and OSError.
    """
    files, found = open_files(source), open_files(path)
    if options is None:
        convs = any(t.dtype == "F8_E4M3" and len(t.shape) > 2 for t in found.tensors.values())
        options = Options(
            found.metadata.get("recipe", "published"), found.metadata.get("convs", "fp8" if convs else "bf16")
        )
    check(files, options, refusal)
    layout = plan(weights_of(files, options), options)
    stored = {name: name for name in found.tensors}
    for name in found.tensors:  # a scale may have the other of its two names
        stored.setdefault(name.removesuffix(f"weight.{SCALE_SUFFIX}") + SCALE_SUFFIX, name)
    differences = [f"{shown(name)} is missing" for name in layout if name not in stored]
    expected = {stored[name]: tensor for name, tensor in layout.items() if name in stored}
    for name, tensor in found.tensors.items():
        if name not in expected:
            differences.append(f"{shown(name)} does not belong to the recipe's result")
        elif tensor.dtype != expected[name].dtype or (tensor.shape != expected[name].shape and tensor.shape != (1,)):
            differences.append(
                f"{shown(name)} is {tensor.dtype} {list(tensor.shape)}, the recipe makes it "
                f"{expected[name].dtype} {list(expected[name].shape)}"
            )
            del expected[name]
    changes: dict[str, _Change] = {}
    with open_regular(path) as file:

        def compare(name: str, begin: int, data: memoryview):
            tensor = found.tensors.get(stored.get(name, ""))
            if tensor is None or tensor.name not in expected:
                return
            file.seek(tensor.begin + begin)
            there = file.read(len(data))
            if there != data:
                changes.setdefault(tensor.name, _Change()).add(there, data, DTYPES[tensor.dtype])

        digests, _ = _produce(files, options, device, compare, on_progress)
    differences += [
        f"{shown(name)}: {change.count} of {found.tensors[name].count} values differ, by at most {change.largest:.6g} "
        f"(file {change.there:.6g}, recipe {change.here:.6g})"
        for name, change in changes.items()
    ]
    named = found.metadata.get("source_sha256")
    if named not in (None, " ".join(digests)):
        differences.append(
            f"The file was made from a source with the SHA-256 {shown(named, 1000)}; this one has {' '.join(digests)}"
        )
    return differences


@dataclass
class _Change:
    """The stored values of one tensor that differ: how many, and the pair that differs most."""

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
