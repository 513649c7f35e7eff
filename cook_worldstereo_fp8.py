"""Makes the FP8 or INT8 file of a WorldStereo model, and checks such files. Needs torch only.

    python cook_worldstereo_fp8.py SRC DST [--recipe default|published|int8] [--convs fp8|bf16]
    python cook_worldstereo_fp8.py --verify FILE SRC    checks that FILE is what the recipe makes of SRC, byte for byte
    python cook_worldstereo_fp8.py --compare A B        the error of B's weights against A's

SRC is a .safetensors file, or the .safetensors.index.json of a model in shards.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if not __package__:  # run as a script
    import standalone

    standalone.import_pack()
    __package__ = standalone.PACKAGE

try:
    import torch  # noqa: F401
except ImportError:
    sys.exit("This needs PyTorch: run it with the Python that runs ComfyUI (in the portable version python_embeded).")

from . import remap
from .files.atomic import new_file
from .files.text import shown
from .fp8.cook import FORMAT_VERSION, TOOL_VERSION, Options, cook, verify
from .fp8.files import Progress, open_files
from .fp8.recipe import CONVS, EXCLUDED, RECIPES
from .fp8.report import Report, compare
from .fp8.rotation import GROUP
from .worldstereo.config import CONFIG_FILE, config_to_embed

SOURCE_PAGE = "https://huggingface.co/hanshanxue/WorldStereo"
BASE_PAGE = "https://github.com/Wan-Video/Wan2.1"
APACHE_LICENSE = "LICENSE-Apache-2.0"
CARD_FILES = ("README.md", CONFIG_FILE, "LICENSE", APACHE_LICENSE, "NOTICE")
REPORT_FILES = ("report.json", "report.txt", "report.png")
SECONDS_BETWEEN_LINES = 2.0


def _write(path: Path, text: str):
    with new_file(path, overwrite=True) as file:
        file.write(text.encode())


def write_report(report: Report, folder: Path):
    """report.json, report.txt and report.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text, picture = (folder / name for name in REPORT_FILES)
    _write(data, json.dumps(report.as_dict(), indent=1))
    _write(text, report.as_text())
    with new_file(picture, overwrite=True) as file:
        report.picture().save(file, "PNG")
    print(f"The report is in {folder}.")


# For FP8 and INT8: the format's name in a card, how the card describes the weights, and what NOTICE says was done.
FORMATS = (
    (
        "FP8",
        "FP8 (`float8_e4m3fn`, one BF16 `scale_weight` for each)",
        "converted to float8_e4m3fn with one scale each",
    ),
    (
        "INT8",
        f"INT8 (ComfyUI's `int8_tensorwise`, rotated in groups of {GROUP} channels, one FP32 `weight_scale` per row)",
        f"rotated in groups of {GROUP} channels and converted to int8 with one scale per row",
    ),
)


def write_card(report: Report, folder: Path, options: Options, config: str | None):
    """Writes the files that a model repository needs beside the model: README.md, config.json, LICENSE, the Apache
    License and NOTICE."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(report.heading)
    kinds = [
        f"| `{kind}` | {error.relative:.3%} | {error.rms:.3e} | {error.max:.3e} | {error.zeroed / error.count:.4%} |"
        for kind, error in report.errors_by_kind()
    ]
    worst = [
        f"| `{error.name}` | {error.relative:.3%} | {error.rms:.3e} | {error.max:.3e} | {error.scale:.4g} |"
        for error in report.worst()
    ]
    kind, form, converted = FORMATS[options.recipe == "int8"]
    total = report.total(report.errors)
    readme = f"""---
license: apache-2.0
base_model: hanshanxue/WorldStereo
base_model_relation: quantized
pipeline_tag: image-to-video
tags: [worldstereo, wan, {kind.lower()}, comfyui]
---

# WorldStereo, scaled {kind}

A [WorldStereo]({SOURCE_PAGE}) checkpoint with its large weights in {form},
for the node Load WorldStereo FP8 in ComfyUI.

| | |
|---|---|
{chr(10).join(f"| {what} | {value} |" for what, value in facts.items() if what != "time")}

## Error

Against the source's weights, over all {kind} weights: relative RMS error {total.relative:.3%}, SQNR {total.sqnr or 0:.2f} dB,
{total.zeroed / total.count:.4%} of the values became zero, {total.saturated / total.count:.4%} saturated.
{report.gain() if report.published else ""}{" ".join(report.notes)}

| kind of weight | relative RMS error | RMS error | largest error | became zero |
|---|---|---|---|---|
{chr(10).join(kinds)}

The worst:

| weight | relative RMS error | RMS error | largest error | scale |
|---|---|---|---|---|
{chr(10).join(worst)}

## How it was made

`python cook_worldstereo_fp8.py SRC DST --recipe {options.recipe} --convs {options.convs}` (format {FORMAT_VERSION}, version
{TOOL_VERSION}). The same source gives the same bytes; `--verify FILE SRC` checks them. Tensors stay BF16 if their names
contain any of: {", ".join(EXCLUDED)}.

## Licence

The base model Wan2.1-I2V-14B is under the Apache License 2.0 ({APACHE_LICENSE}); NOTICE says what was changed. What this
repository adds to it is under the MIT License (LICENSE). The terms of the source are on [its own page]({SOURCE_PAGE}).
"""
    notice = f"""WorldStereo, scaled {kind}

This product includes weights of Wan2.1-I2V-14B ({BASE_PAGE}), Copyright (c) Alibaba Wan Team, licensed under
the Apache License, Version 2.0; see {APACHE_LICENSE}.

It is made from WorldStereo ({SOURCE_PAGE}),
source SHA-256: {facts["source SHA-256"]}

Statement of changes: {len(report.errors)} weights were {converted}, by the recipe
"{options.recipe}" with convolutions in {options.convs}. All other tensors are the source's, in BF16.
"""
    files = {"README.md": readme, "NOTICE": notice}
    files |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", APACHE_LICENSE)}
    if config is not None:
        files[CONFIG_FILE] = config
    for name, text in files.items():
        _write(folder / name, text)
    print(f"The card is in {folder}.")


class _Line:
    """Prints progress: on a terminal one line that is rewritten, elsewhere a new line every few seconds."""

    def __init__(self):
        self.printed = time.monotonic()

    def __call__(self, progress: Progress):
        finished = progress.nbytes == progress.total_nbytes
        if finished or time.monotonic() - self.printed > (0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES):
            self.printed = time.monotonic()
            end = "\n" if finished or not sys.stderr.isatty() else "\r"
            print(f"{progress}   ", end=end, file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="SRC", help="the source (with --verify: the cooked file)")
    parser.add_argument("second", metavar="DST", help="the result (with --verify: the source)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="check a cooked file against its source, writing nothing")
    what.add_argument("--compare", action="store_true", help="compare two files, BF16, FP8 or INT8, of the same names")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: FP8 with a smaller error, in the published format; published: bit for bit as the published files; "
        "int8: INT8 with rotation (SRC may be FP8, with a larger error). With --verify: what the file says, else "
        "published",
    )
    parser.add_argument(
        "--convs",
        choices=sorted(set(CONVS.values())),
        help="convolution weights; published recipe: fp8, the others: bf16",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DST, report and card")
    parser.add_argument(
        "--config", type=Path, help="the model's config.json; else the one beside SRC or in its metadata"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.json, report.txt and report.png (Pillow)"
    )
    parser.add_argument(
        "--card", type=Path, metavar="DIR", help="write README, config.json, LICENSE and NOTICE for a model repository"
    )
    options = parser.parse_args(arguments)
    if options.card and (options.verify or options.compare):
        parser.error("--card needs a cook: SRC DST")
    if options.verify and options.convs and not options.recipe:
        parser.error("--verify with --convs needs --recipe")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 where something failed or a verified file differs."""
    given = parse_arguments(arguments)
    try:
        for folder, names in ((given.report, REPORT_FILES), (given.card, CARD_FILES)):
            there = [name for name in names if folder and (folder / name).exists()]
            if there and not given.overwrite:
                raise FileExistsError(
                    f"{folder} holds {', '.join(there)} already. Choose another folder, or --overwrite."
                )
            there = [path for path in (folder, *folder.parents) if os.path.lexists(path)] if folder else []
            if there and not there[0].is_dir():
                raise FileExistsError(f"{there[0]} is not a folder. Choose another one for {folder}.")
        if given.compare:
            report = compare(given.first, given.second, _Line())
            print(report.as_text())
            if given.report:
                write_report(report, given.report)
            return 0
        if given.verify:
            options = Options(given.recipe, given.convs) if given.recipe else None
            differences = verify(given.first, given.second, options, refusal=remap.source_refusal, on_progress=_Line())
            if not differences:
                print(f"{given.first} is what the recipe makes of {given.second}, byte for byte.")
                return 0
            print(f"{given.first} is not what the recipe makes of {given.second}: {len(differences)} differences.")
            print("\n".join(differences))
            return 1
        options = Options(given.recipe or RECIPES[0], given.convs)
        find_config = functools.partial(config_to_embed, given=given.config)
        report = cook(
            given.first,
            given.second,
            options,
            overwrite=given.overwrite,
            find_config=find_config,
            refusal=remap.source_refusal,
            on_progress=_Line(),
        )
        print(report.as_text())
        if given.report:
            write_report(report, given.report)
        if given.card:
            source = open_files(given.first)
            write_card(report, given.card, options, find_config(source))
        return 0
    except (ValueError, OSError) as e:
        print(f"\nerror: {shown(e, 2000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncancelled; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
