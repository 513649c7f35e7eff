"""The quantisation error of every weight, as numbers, as text and as one picture."""

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files.text import first_few, shown
from . import int8
from .files import DTYPES, OnProgress, Progress, Tensor, TensorFiles, open_files
from .recipe import COMFY_QUANT, SCALE_SUFFIXES, is_side_tensor
from .rotation import rotate

WORST = 10  # weights named in the text
COMPARED = 2**19  # elements compared at once

# The picture's colours from small to large errors, and its sizes in pixels.
COLOURS = ((38, 70, 120), (42, 140, 150), (140, 190, 110), (240, 200, 90), (215, 80, 60))
CELL, MARGIN, FONT_SIZE, LEGEND = (24, 20), 20, 13, 240
ROWS, COLUMNS = 100, 64  # kinds and layers drawn at most; WorldStereo has 30 and 40


@dataclass
class WeightError:
    """The error of a stored weight against its reference. `scale` is the largest of an INT8 weight's scales, and None
    for a weight that is not quantised."""

    name: str
    count: int
    scale: float | None = None
    max: float = 0.0
    error_squares: float = 0.0
    signal_squares: float = 0.0
    zeroed: int = 0  # values other than 0 that became 0
    saturated: int = 0  # values that clipping changed by more than rounding would have; see `saturation`

    def add(self, values: torch.Tensor, stored: torch.Tensor, counts: torch.Tensor | int = 1, limit: float = math.inf):
        """Adds reference values (FP32, any shape), the FP64 values stored for them, and how often each pair occurs.

        limit: the magnitude above which a value is saturated; see `saturation`.
        """
        values = values.double()
        error = (stored - values).abs_()
        self.max = max(self.max, error.max().item())
        self.error_squares += (error.square_() * counts).sum().item()
        self.signal_squares += (values.square() * counts).sum().item()
        self.zeroed += int((((stored == 0) & (values != 0)) * counts).sum())
        self.saturated += int(((values.abs_() > limit) * counts).sum())

    def merge(self, other: "WeightError"):
        """Adds the error of another weight, or of another part of this one."""
        self.max = max(self.max, other.max)
        self.error_squares += other.error_squares
        self.signal_squares += other.signal_squares
        self.zeroed += other.zeroed
        self.saturated += other.saturated

    @property
    def rms(self) -> float:
        """The RMS error, in the weight's own unit."""
        return math.sqrt(self.error_squares / self.count)

    @property
    def relative(self) -> float:
        """The RMS error as a share of the RMS of the weight."""
        return math.sqrt(self.error_squares / self.signal_squares) if self.signal_squares else 0.0

    @property
    def sqnr(self) -> float | None:
        """Signal to quantisation noise, dB; None without an error."""
        return -20 * math.log10(self.relative) if self.relative else None

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "name": self.name,
            "elements": self.count,
            "scale": self.scale,
            "max_error": self.max,
            "rms_error": self.rms,
            "relative_rms_error": self.relative,
            "sqnr_db": self.sqnr,
            "zeroed_share": self.zeroed / self.count,
            "saturated_share": self.saturated / self.count,
        }


def saturation(dtype: torch.dtype) -> float:
    """The magnitude up to which clipping to an FP8 dtype's largest number is no worse than rounding: half a spacing
    beyond it, 464 for float8_e4m3fn."""
    info = torch.finfo(dtype)
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2


@dataclass
class Report:
    """The errors of the weights of one file.

    heading: what was done, as (label, value) lines. published: the published recipe's errors of the same weights; empty
    where they are not known. notes: further remarks, such as tensors that were not compared.
    """

    heading: list[tuple[str, str]]
    errors: list[WeightError]
    published: list[WeightError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def worst(self) -> list[WeightError]:
        """The weights with the largest error relative to their size, worst first."""
        return sorted(self.errors, key=lambda error: -error.relative)[:WORST]

    def total(self, errors: list[WeightError]) -> WeightError:
        """All weights taken together."""
        total = WeightError("all", sum(error.count for error in errors))
        for error in errors:
            total.merge(error)
        return total

    def as_dict(self) -> dict:
        """For JSON."""
        result: dict = {
            "heading": dict(self.heading),
            "notes": self.notes,
            "total": self.total(self.errors).as_dict() if self.errors else None,
            "worst": [error.name for error in self.worst()],
            "weights": [error.as_dict() for error in self.errors],
        }
        if self.published:
            result["published_total"] = self.total(self.published).as_dict()
            for entry, published in zip(result["weights"], self.published):
                entry["published"] = {"max_error": published.max, "rms_error": published.rms}
        return result

    def as_text(self) -> str:
        """Heading, a table by kind of weight, totals, and the worst weights, in lines."""
        width = max(len(what) for what, _ in self.heading)
        lines = [f"{what:<{width}}  {value}" for what, value in self.heading]
        if self.errors:
            lines += ["", *self.table(self.errors_by_kind())]
            total = self.total(self.errors)
            lines += [
                "",
                f"All {len(self.errors)} weights: relative RMS error {total.relative:.4%}, "
                f"SQNR {_decibels(total.sqnr)} dB, largest error {total.max:.3g}, "
                f"became zero {total.zeroed / total.count:.4%}, "
                f"saturated {total.saturated / total.count:.4%}.",
            ]
            if self.published:
                lines.append(self.gain())
            lines += [
                "",
                f"The {len(self.worst())} weights with the largest relative error:",
                *self.table([(error.name, error) for error in self.worst()]),
            ]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes]) + "\n"

    def gain(self) -> str:
        """How much smaller the errors are than the published recipe's, in one line."""
        pairs = list(zip(self.errors, self.published))
        gains = [1 - error.rms / published.rms if published.rms else 0.0 for error, published in pairs]
        whole = 1 - self.total(self.errors).rms / (self.total(self.published).rms or 1.0)
        larger = sum(error.rms > published.rms or error.max > published.max for error, published in pairs)
        return (
            f"Against the published recipe: RMS error smaller by {whole:.2%} over all, by {min(gains):.2%} to "
            f"{max(gains):.2%} per weight; RMS or largest error larger in {larger} of {len(pairs)} weights."
        )

    def errors_by_kind(self) -> list[tuple[str, WeightError]]:
        """The weights of each kind (their name without the layer number) taken together."""
        kinds: dict[str, list[WeightError]] = {}
        for error in self.errors:
            kinds.setdefault(kind_and_layer(error.name)[0], []).append(error)
        return [(kind, self.total(errors)) for kind, errors in kinds.items()]

    @staticmethod
    def table(rows: list[tuple[str, WeightError]]) -> list[str]:
        """The lines of a table of errors, each with its label."""
        rows = [(shown(name), error) for name, error in rows]
        width = max(len(name) for name, _ in rows)
        scale = "  scale" if any(error.scale is not None for _, error in rows) else ""
        lines = [f"{'':<{width}}  SQNR dB  relative  RMS error  max error      zero{scale}"]
        for name, error in rows:
            scale = "" if error.scale is None else f"{error.scale:.4g}"
            lines.append(
                f"{name:<{width}}  {_decibels(error.sqnr):>7}  {error.relative:8.4%}  {error.rms:9.3e}  "
                f"{error.max:9.3e}  {error.zeroed / error.count:8.4%}  {scale}".rstrip()
            )
        return lines

    def picture(self):
        """A PIL image: the relative RMS error of each weight, a row for each kind and a column for each layer."""
        from PIL import Image, ImageDraw, ImageFont  # not at the top: cooking itself needs torch and safetensors only

        cells: dict[str, dict[int, float]] = {}
        for error in self.errors:
            kind, layer = kind_and_layer(error.name)
            if layer < COLUMNS and (kind in cells or len(cells) < ROWS):
                cells.setdefault(kind, {})[layer] = error.relative
        drawn = sum(map(len, cells.values()))
        every = [value for row in cells.values() for value in row.values()] or [0.0]
        low, high = min(every), max(every)

        font = ImageFont.load_default(FONT_SIZE)
        label = int(max((font.getlength(shown(kind)) for kind in cells), default=0)) + 12
        columns = 1 + max((layer for row in cells.values() for layer in row), default=0)
        top = MARGIN + 3 * CELL[1]
        width = 2 * MARGIN + max(label + columns * CELL[0], 2 * LEGEND)
        height = top + len(cells) * CELL[1] + 3 * CELL[1] + MARGIN
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        text = lambda x, y, words, anchor="lm": draw.text((x, y), words, "black", font, anchor)

        heading = "Relative RMS error by layer (across) and kind of weight (down)"
        if drawn < len(self.errors):
            heading += f"; {drawn} of {len(self.errors)} weights are drawn"
        text(MARGIN, MARGIN + CELL[1] / 2, heading)
        for column in range(columns):
            text(MARGIN + label + (column + 0.5) * CELL[0], top - CELL[1] / 2, str(column), "mm")
        for row, (kind, values) in enumerate(cells.items()):
            y = top + row * CELL[1]
            text(MARGIN, y + CELL[1] / 2, shown(kind))
            for layer, value in values.items():
                x = MARGIN + label + layer * CELL[0]
                draw.rectangle((x, y, x + CELL[0] - 2, y + CELL[1] - 2), _colour(value, low, high))

        y = height - MARGIN - CELL[1]
        for x in range(LEGEND):
            draw.line((MARGIN + x, y, MARGIN + x, y + CELL[1] / 2), _colour(x, 0, LEGEND - 1))
        text(MARGIN, y + CELL[1], f"{low:.3%}")
        text(MARGIN + LEGEND, y + CELL[1], f"{high:.3%}", "rm")
        return image


def _decibels(sqnr: float | None) -> str:
    return "exact" if sqnr is None else f"{sqnr:.2f}"


def _colour(value: float, low: float, high: float) -> tuple[int, ...]:
    place = (value - low) / (high - low) * (len(COLOURS) - 1) if high > low else 0.0
    i = min(int(place), len(COLOURS) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(COLOURS[i], COLOURS[i + 1]))


def kind_and_layer(name: str) -> tuple[str, int]:
    """`blocks.7.attn1.to_q.weight` → (`blocks.N.attn1.to_q`, 7); the layer is 0 for a name without a number."""
    name = name.removesuffix(".weight")
    number = re.search(r"(?<=\.)[0-9]{1,9}(?=\.|$)", name)
    return (name, 0) if number is None else (name[: number.start()] + "N" + name[number.end() :], int(number.group()))


def compare(first: str | Path, second: str | Path, on_progress: OnProgress | None = None) -> Report:
    """The errors of the second file's weights against the first's. Each file may be BF16, FP16, FP32, scaled FP8, INT8
    or a mix.

    Raises ValueError if the files have no weight name in common, an FP8 weight's scale is not one number, or an INT8
    weight's scales or description do not fit it, and OSError.
    """
    a, b = open_files(first), open_files(second)
    a_weights, b_weights = (
        {name: tensor for name, tensor in files.tensors.items() if not is_side_tensor(name)} for files in (a, b)
    )
    common = [name for name in b_weights if name in a_weights]
    if not common:
        raise ValueError(
            f"{shown(a.path.name)} and {shown(b.path.name)} have no tensor name in common. One of them may have "
            "diffusers names and the other native Wan names: compare files of the same names."
        )
    notes = []
    for files, here, there in ((a, a_weights, b_weights), (b, b_weights, a_weights)):
        alone = [name for name in here if name not in there]
        if alone:
            notes.append(f"{len(alone)} tensors are only in {shown(files.path.name)}: {first_few(alone, WORST)}")
    errors, same, done, started = [], 0, 0, time.monotonic()
    total = sum(b_weights[name].nbytes for name in common)
    for number, name in enumerate(common, 1):
        mine, other = a_weights[name], b_weights[name]
        if mine.shape != other.shape:
            notes.append(
                f"{shown(name)} is {list(mine.shape)} in {shown(a.path.name)}, {list(other.shape)} in "
                f"{shown(b.path.name)}"
            )
            continue
        if not mine.count:
            continue
        a_scale, b_scale = _scale(a, mine), _scale(b, other)
        a_group, b_group = _group(a, mine), _group(b, other)
        scale = None if b_scale is None else b_scale.max().item()
        error = WeightError(name, mine.count, scale)
        fp8 = other.dtype.startswith("F8")
        limit = scale * saturation(DTYPES[other.dtype]) if scale is not None and fp8 else math.inf
        width = mine.shape[-1] if mine.shape else 1
        rows, begin = max(COMPARED // width, 1), 0
        for x, y in zip(a.slices(mine, rows * width), b.slices(other, rows * width)):
            x, y = x.view(-1, width), y.view(-1, width)
            error.add(_restored(x, a_scale, a_group, begin), _restored(y, b_scale, b_group, begin), limit=limit)
            begin += len(y)
            done += y.numel() * DTYPES[other.dtype].itemsize
            if on_progress is not None:
                on_progress(Progress(done, total, number, len(common), time.monotonic() - started))
        if not math.isfinite(error.error_squares):
            notes.append(f"{shown(name)} holds NaN or infinite values and is left out")
        elif error.max == 0 and b_scale is None:
            same += 1
        else:
            errors.append(error)
    heading = [
        ("reference", shown(a.path.name)),
        ("compared", shown(b.path.name)),
        ("weights", f"{len(errors)} compared below, {same} more are equal in both and not quantised"),
    ]
    return Report(heading, errors, notes=notes)


def _restored(values: torch.Tensor, scale: torch.Tensor | None, group: int, begin: int) -> torch.Tensor:
    """Rows of a weight [rows, K], starting at row `begin`, dequantised to float64."""
    if scale is None:
        return values.double()
    rows = values.double() * (scale[begin : begin + len(values)] if len(scale) > 1 else scale)
    return rotate(rows, group) if group else rows


def _group(files: TensorFiles, tensor: Tensor) -> int:
    """How many channels of an INT8 weight are rotated together; 0 for any other weight."""
    described = files.tensors.get(tensor.name.removesuffix("weight") + COMFY_QUANT)
    if tensor.dtype != "I8" or described is None:
        return 0
    where = f"{shown(files.path.name)}: {shown(described.name)}"
    content = b"".join(piece.numpy().tobytes() for piece in files.slices(described))
    group = int8.group_of(int8.read_description(content, where))
    int8.check_group(group, tensor.shape[-1], where)
    return group


def _scale(files: TensorFiles, tensor: Tensor) -> torch.Tensor | None:
    """The scales of an FP8 or INT8 weight, float64 [1 or N, 1], 1 if the file has none; None for any other weight."""
    if not tensor.dtype.startswith("F8") and tensor.dtype != "I8":
        return None
    names = [tensor.name.removesuffix("weight") + suffix for suffix in SCALE_SUFFIXES]
    found = [files.tensors[name] for name in names if name in files.tensors]
    if not found:
        return torch.ones(1, 1, dtype=torch.float64)
    if found[0].count != 1 and (tensor.dtype != "I8" or found[0].count != tensor.shape[0]):
        raise ValueError(
            f"{shown(files.path.name)}: {shown(found[0].name)} has the shape {list(found[0].shape)}. Only one scale "
            "for the whole weight, or for INT8 one for each row, can be compared."
        )
    return torch.cat(list(files.slices(found[0]))).double().reshape(-1, 1)
