"""Index and reads of shards compared with their limits: `python -m benchmarks.storage`.

index: CPU seconds of indexing cached shards (sha256, a crc32c per member, grouping), compared with sha256 alone over
the same bytes. read: CPU seconds of reading samples with their crc32c verified, compared with webdataset's own reader,
which streams in order and verifies nothing; ours is timed in a random order.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
import tempfile
from pathlib import Path

import google_crc32c
import numpy as np
from webdataset.compat import WebDataset

from benchmarks.report import Pairs, paired, print_json, print_table, summary
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index, index_shard
from pretrain.data.shards.reader import Reader


def make_shards(folder: Path, *, shards: int, samples: int, length: int) -> list[str]:
    """Shards of a `.jpg` of about `length` random bytes and a `.cls` a sample; no image is decoded here."""
    random = np.random.default_rng(0)
    paths = []
    for shard in range(shards):
        path = folder / f"bench-{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for sample in range(samples):
                payload = random.bytes(int(random.integers(length // 2, length * 3 // 2)))
                for name, data in ((f"{shard:03d}{sample:06d}.jpg", payload), (f"{shard:03d}{sample:06d}.cls", b"7")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        paths.append(str(path))
    return paths


def bench_index(paths: list[str], rounds: int) -> Pairs:
    """Index every shard, against hashing every shard."""

    def sha256_alone() -> None:
        for path in paths:
            with Path(path).open("rb") as file:
                hashlib.file_digest(file, "sha256")

    return paired(lambda: [index_shard(path) for path in paths], sha256_alone, rounds)


def bench_read(paths: list[str], rounds: int) -> Pairs:
    """Read every sample once in a random order, against webdataset's pass over the same shards."""
    dataset = Dataset.open(paths)
    reader = Reader(dataset)
    places = [(shard, sample) for shard, count in enumerate(dataset.counts.tolist()) for sample in range(count)]
    order = np.random.default_rng(0).permutation(len(places)).tolist()

    def ours() -> None:
        for i in order:
            reader.read(*places[i])

    def theirs() -> None:
        count = sum(1 for _ in WebDataset(paths, shardshuffle=False, empty_check=False))
        assert count == len(places), count

    return paired(ours, theirs, rounds)


def main(argv: list[str] | None = None) -> None:
    """Measure and print; the last lines are JSON, one a comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--length", type=int, default=110_000, help="mean bytes of an image")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="where the shards are made, a local disk (default: a temporary one)"
    )
    arguments = parser.parse_args(argv)
    assert google_crc32c.implementation == "c", "google_crc32c fell back to Python"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = {"shards": arguments.shards, "samples": arguments.samples, "length": arguments.length}
        paths = make_shards(Path(folder), **sizes)
        build_index(paths)
        megabytes = sum(Path(path).stat().st_size for path in paths) / 1e6
        samples = arguments.shards * arguments.samples
        index, read = bench_index(paths, arguments.rounds), bench_read(paths, arguments.rounds)
    records = []
    for name, pairs, unit, scale in (
        ("index", index, "MB/s per core", lambda seconds: megabytes / seconds),
        ("read", read, "us CPU per sample", lambda seconds: seconds / samples * 1e6),
    ):
        ours, baseline = (scale(float(np.median(seconds))) for seconds in (pairs.ours, pairs.baseline))
        records.append(summary(f"storage.{name}", pairs, ours=ours, baseline=baseline, unit=unit))
    columns = ["", "ours", "baseline", "unit", "baseline/ours CPU", "quartiles"]
    title = f"{samples} samples, {megabytes:.0f} MB; index against sha256 alone, read against webdataset's reader"
    print_table(title, columns, [[r[k] for k in ("name", "ours", "baseline", "unit", "ratio", "iqr")] for r in records])
    for record in records:
        print_json(record)


if __name__ == "__main__":
    main()
