"""`fovea data`: write, index, verify, show and measure shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.core.files import write_json
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import console, safe_output
from pretrain.core.text import shown, shown_lines
from pretrain.data import channels, statistics
from pretrain.data.shards.catalog import fingerprint, read_rows
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, frame_members
from pretrain.data.shards.index import build_index
from pretrain.data.shards.listing import expand, gone_shards, is_shard
from pretrain.data.shards.verify import Damage, verify_shards
from pretrain.data.show import Statistics, examine, save_sheet
from pretrain.data.terminal import human, positive, progress
from pretrain.data.write import command, curate


@safe_output()
def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 where `verify` found damage, 2 for a wrong argument."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        print(f"fovea data {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fovea data",
        description="Write, index, verify, show and measure WebDataset shards.",
        epilog="Also: fovea data convert, annotations of other tools to COCO json or csv; fovea data dups, images that "
        "are there twice. Each has --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cores = len(os.sched_getaffinity(0))

    command.add_to(commands)
    curate.add_command(commands)

    index = commands.add_parser("index", help="index existing shards, without rewriting them")
    index.add_argument("shards", nargs="+", help="folder, glob, or 'name-{000000..000127}.tar'")
    index.add_argument("--out", type=Path, metavar="DIR", help="write the index here (default: next to the shards)")
    index.add_argument("--force", action="store_true", help="read shards again even if they are indexed")
    index.add_argument(
        "--key-rule",
        choices=("first-dot", "last-dot"),
        help="where a sample's key ends in a member's name (default: at the first dot, as webdataset does, and dots in "
        "names that hide images are an error)",
    )
    index.add_argument("--forget", action="store_true", help="remove missing shards from the index")
    index.add_argument("--workers", type=positive, default=cores, metavar="N", help=f"processes (default: {cores})")
    index.set_defaults(run=_index)

    verify = commands.add_parser("verify", help="read every byte again and name what is damaged")
    verify.add_argument("shards", nargs="+", help="folder, glob, or 'name-{000000..000127}.tar'")
    verify.add_argument("--index", type=Path, metavar="DIR", help="where the index is (default: next to the shards)")
    verify.add_argument("--workers", type=positive, default=cores, metavar="N", help=f"processes (default: {cores})")
    verify.set_defaults(run=_verify)

    show = commands.add_parser("show", help="a contact sheet, and statistics")
    show.add_argument("shards", nargs="+", help="folder, glob, or 'name-{000000..000127}.tar'")
    show.add_argument("--index", type=Path, metavar="DIR", help="where the index is (default: next to the shards)")
    show.add_argument("--out", type=Path, metavar="PNG", help="write a contact sheet")
    show.add_argument("--count", type=positive, default=64, metavar="N", help="images on the sheet (default: 64)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="which images (default: 0)")
    show.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="stored values that are black and white, for images of more than 8 bits (data.range)",
    )
    show.add_argument(
        "--examine", type=positive, default=2000, metavar="N", help="samples for statistics (default: 2000)"
    )
    show.set_defaults(run=_show)

    stats = commands.add_parser("stats", help="the values of every channel, measured, and the settings that fit them")
    stats.add_argument("source", nargs="+", help="shards (folder, glob, pattern), or one folder of images")
    stats.add_argument("--index", type=Path, metavar="DIR", help="where the index is (default: next to the shards)")
    stats.add_argument(
        "--out", type=Path, metavar="JSON", help=f"write them here (default: {statistics.FILE} in the index of shards)"
    )
    stats.add_argument(
        "--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="data.range under which mean and std are measured"
    )
    stats.add_argument("--examine", type=positive, default=2000, metavar="N", help="images to read (default: 2000)")
    stats.add_argument("--seed", type=int, default=0, metavar="N", help="which images (default: 0)")
    stats.set_defaults(run=_stats)
    return parser


def _index(arguments: argparse.Namespace) -> int:
    shards = expand(arguments.shards)
    listed = {folder: read_rows(folder) for folder in {Path(shard).parent for shard in shards}}
    gone = gone_shards(arguments.shards, shards, listed) if arguments.out is None else []
    start = time.monotonic()
    with progress() as bar:
        task = bar.add_task("indexing", total=len(shards))
        rows = build_index(
            shards,
            out=arguments.out,
            workers=arguments.workers,
            force=arguments.force,
            key_rule=arguments.key_rule,
            forget=gone if arguments.forget else (),
            done=lambda row: bar.advance(task),
        )
    extensions = sorted({extension for row in rows for extension in row.extensions})
    samples, size = sum(row.count for row in rows), sum(row.bytes for row in rows)
    print(f"{samples} samples in {len(rows)} shards, {human(size)}, {time.monotonic() - start:.1f} s")
    print(f"members: {shown(', '.join(extensions[:12]))}{' ...' if len(extensions) > 12 else ''}")
    if not frame_members(extensions):
        print(f"no sample has an image: none of these extensions is {', '.join(IMAGE_EXTENSIONS)}")
    print(f"fingerprint: {fingerprint(rows)}")
    for shard in gone:
        print(f"{shown(shard)}: {'removed from the index' if arguments.forget else 'in the index, but missing'}")
    if gone and not arguments.forget:
        print("restore these shards, or remove them from the index with --forget", file=sys.stderr)
        return 2
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    shards = expand(arguments.shards)
    damages: list[Damage] = []
    samples = size = 0
    with progress() as bar:
        task = bar.add_task("verifying", total=len(shards))
        for result in verify_shards(shards, spec=arguments.shards, index=arguments.index, workers=arguments.workers):
            bar.advance(task)
            samples, size = samples + result.samples, size + result.bytes
            damages += result.damages
    for damage in damages:
        print(damage)
    table = Table("shards", "samples", "bytes", "damaged shards", "damages")
    damaged = len({damage.shard for damage in damages})
    table.add_row(str(len(shards)), str(samples), human(size), str(damaged), str(len(damages)))
    console().print(table)
    return 1 if damages else 0


def _show(arguments: argparse.Namespace) -> int:
    dataset = Dataset.open(arguments.shards, arguments.index)
    value_range = _value_range(arguments.range)
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        statistics = examine(
            dataset,
            limit=arguments.examine,
            seed=arguments.seed,
            value_range=value_range,
            done=lambda: bar.advance(task),
        )
    console().print(_statistics_table(statistics))
    if arguments.out is not None:
        save_sheet(dataset, arguments.out, count=arguments.count, seed=arguments.seed, value_range=value_range)
        print(f"contact sheet: {arguments.out}")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    value_range, sources = _value_range(arguments.range), arguments.source
    names = channels.names_beside(sources) or ()
    if len(sources) == 1 and Path(sources[0]).is_dir() and not any(map(is_shard, Path(sources[0]).iterdir())):
        files, number = statistics.of_folder(Path(sources[0]), arguments.examine, arguments.seed)
        fingerprint, out = None, arguments.out
    else:
        dataset = Dataset.open(sources, arguments.index)
        files, number = statistics.of_shards(dataset, arguments.examine, arguments.seed)
        fingerprint = dataset.fingerprint
        out = arguments.out or dataset.sidecar(0).parent / statistics.FILE
    with progress() as bar:
        task = bar.add_task("measuring", total=number)
        measured = statistics.measure(bar.track(files, task_id=task), number, value_range)
    for name, reason in measured.unreadable[:5]:
        print(f"unreadable {shown(name)}: {shown(reason)}")
    found = measured.as_json(fingerprint, value_range)
    if not measured.channels:
        raise ValueError(f"none of {measured.looked} images can be read")
    for number, content in found["by_channels"].items():
        print(f"{content['images']} of {measured.looked} images have {number} channels: {content['depth']}")
        print(
            "\n".join(
                _channel_lines(content, names if len(names) == int(number) else list(map(str, range(int(number)))))
            )
        )
        print(" ".join(f"data.{key}={json.dumps(value)}" for key, value in content["settings"].items()))
    if len(measured.channels) > 1:
        print("images of several numbers of channels: gray is also read as 3, others are not")
    if any(
        "8-bit image" in content["depth"] and " and " in content["depth"] for content in found["by_channels"].values()
    ):
        print("images of 8 bits among others: one data.range does not fit both")
    if out is not None:
        write_json(out, found)
        print(f"statistics: {out}")
    return 0


def _channel_lines(content: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """A line for each channel, not cut to the width of a terminal."""
    columns = {"mean": content["mean"], "std": content["std"], "min": content["min"]}
    columns |= {f"{name} %": content["percentiles"][name] for name in ("0.1", "50", "99.9")} | {"max": content["max"]}
    shares = {"at min": content["share_at_min"], "at max": content["share_at_max"]}
    yield "".join(f"{name:>9}" for name in ("channel", *columns, *shares))
    for channel, name in enumerate(names):
        numbers = [f"{values[channel]:.5g}" for values in columns.values()]
        numbers += [f"{values[channel]:.2%}" for values in shares.values()]
        yield "".join(f"{text:>9}" for text in (shown(name), *numbers))


def _value_range(given: list[float] | None) -> tuple[float, float] | None:
    if given is None:
        return None
    if not given[0] < given[1]:
        raise ValueError(f"--range {given[0]:g} {given[1]:g}: expected LOW < HIGH")
    return given[0], given[1]


def _statistics_table(statistics: Statistics) -> Table:
    table = Table(show_header=False)
    for name, value in statistics.rows():
        table.add_row(name, shown_lines(value))
    return table


if __name__ == "__main__":
    sys.exit(run_command("fovea data", main))
