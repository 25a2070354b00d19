"""The loader against the official one, per CPU core: python -m benchmarks.loader --images DIR_OR_TAR

Baseline: the official PIL transforms of MAE (main_pretrain.py) and DINO (main_dino.py), written from their recipes, on
image files. Ours: samples from a tar through its index (crc checked), decoded and cropped; the colours of DINO are the
device's work and not in its time, except in the row "colour on the CPU". One process, one thread, CPU seconds,
interleaved pairs.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import simplejpeg
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.report import paired, print_json, print_table, summary
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader.microbatch import HostBatch
from pretrain.data.loader.pipeline import make_loader
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.shards.reader import Reader
from pretrain.data.views.specs import Blur, ColorJitter, Noise, ViewSpec

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, prob=0.8)
GLOBAL, LOCAL, BICUBIC = (0.4, 1.0), (0.05, 0.4), v1.InterpolationMode.BICUBIC
MAE_VIEWS: list[ViewSpec | Noise] = [ViewSpec("image", (224, 224), scale=(0.2, 1.0)), Noise("mask", (196,))]
DINO_VIEWS: list[ViewSpec | Noise] = [
    ViewSpec("global_crops", (224, 224), GLOBAL, jitter=JITTER, grayscale=0.2, blur=Blur(1.0)),
    ViewSpec("global_crops", (224, 224), GLOBAL, jitter=JITTER, grayscale=0.2, blur=Blur(0.1), solarize=0.2),
    ViewSpec("local_crops", (96, 96), LOCAL, count=8, jitter=JITTER, grayscale=0.2, blur=Blur(0.5)),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files, or a .tar of them")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved pairs of a row")
    parser.add_argument("--batch", type=int, default=32, help="images of one measurement")
    parser.add_argument("--rows", nargs="*", help="only the rows whose name contains one of these")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files, dataset = prepare(args.images, Path(folder), args.batch)
        measure(files, dataset, args.rounds, args.rows)
    return 0


def measure(files: list[Path], dataset: Dataset, rounds: int, only: list[str] | None) -> None:
    """Run the comparisons, each call over all the images once; print a table and one JSON line a comparison."""
    batch = len(files)
    mae, dino = (lambda: over(files, pil, official_mae())), (lambda: over(files, pil, official_dino()))
    reader = Reader(dataset)

    def decode_only() -> None:
        for sample in range(batch):
            simplejpeg.decode_jpeg(reader.read(0, sample)["jpg"])

    rows: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "MAE views": (ours(dataset, MAE_VIEWS, batch), mae),
        "MAE views, float on the CPU": (ours(dataset, MAE_VIEWS, batch, "worker"), mae),
        "MAE, torchvision v2 as ours": (lambda: over(files, tensor, torchvision_mae()), mae),
        "DINO 2+8 views": (ours(dataset, DINO_VIEWS, batch), dino),
        "DINO 2+8 views, colour on the CPU": (ours(dataset, DINO_VIEWS, batch, "worker"), dino),
        "DINO 2+8, torchvision v2 as ours": (lambda: over(files, tensor, torchvision_dino()), dino),
        "read and decode only, against MAE": (decode_only, mae),
    }
    chosen = {name: row for name, row in rows.items() if not only or any(part in name for part in only)}
    table: list[list[object]] = []
    records: list[dict[str, object]] = []
    for name, (fast, official) in chosen.items():
        pairs = paired(fast, official, rounds)
        rate, base = batch / sorted(pairs.ours)[rounds // 2], batch / sorted(pairs.baseline)[rounds // 2]
        record = summary(f"loader: {name}", pairs, ours=rate, baseline=base, unit="images per CPU second")
        records.append(record)
        table.append([name, round(rate), round(base), record["ratio"], str(record["iqr"])])
    print_table("Loader, images per CPU second of one core", ["row", "ours", "official", "ratio", "quartiles"], table)
    for record in records:
        print_json(record)


def prepare(images: Path, folder: Path, batch: int) -> tuple[list[Path], Dataset]:
    """`batch` of the JPEG images, evenly spaced, as files (for the baseline) and as an indexed tar (for us)."""
    if images.is_dir():
        found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        blobs = [path.read_bytes() for path in spaced(found, batch)]
    else:
        with tarfile.open(images) as tar:
            members = [member for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))]
            blobs = [file.read() for member in spaced(members, batch) if (file := tar.extractfile(member))]
    files: list[Path] = []
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, blob in enumerate(blobs):
            files.append(folder / f"{number:06d}.jpg")
            files[-1].write_bytes(blob)
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    if not files:
        raise ValueError(f"no JPEG images in {images}")
    build_index([str(folder / "images.tar")])
    return files, Dataset.open(folder / "images.tar")


def ours(
    dataset: Dataset, views: list[ViewSpec | Noise], batch: int, augment_on: str = "device"
) -> Callable[[], HostBatch]:
    """Each call makes one batch: all images of the data set, in another order and with other crops."""
    spec = LoaderSpec(
        views=views,
        in_chans=3,
        mean=MEAN,
        std=STD,
        seed=0,
        block_shards=1,
        global_batch=batch,
        micro_batch=batch,
        augment_on="worker" if augment_on == "worker" else "device",
    )
    batches = make_loader(dataset, spec, num_steps=1 << 30)
    return lambda: next(batches)


def spaced(items: list, count: int) -> list:
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def over(files: list[Path], read: Callable[[Path], object], transform: Callable) -> None:
    for file in files:
        transform(read(file))


def pil(file: Path) -> Image.Image:
    """As torchvision's ImageFolder reads."""
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def tensor(file: Path) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8), mode=ImageReadMode.RGB)  # pyright: ignore[reportReturnType]


def official_mae() -> Callable:
    """Random crop of scale (0.2, 1) by bicubic, flip, normalize."""
    crop = v1.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC)
    return v1.Compose([crop, v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)])


def official_dino() -> Callable:
    """Two global and eight local crops; flip and jitter, then blur and solarize, then normalize, all on PIL images."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> Callable:
        jitter = v1.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        steps = [
            v1.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC),
            v1.RandomHorizontalFlip(0.5),
            v1.RandomApply([jitter], p=0.8),
            v1.RandomGrayscale(0.2),
            v1.RandomApply([lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=blur),
            v1.RandomApply([ImageOps.solarize], p=solarize),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
        return v1.Compose(steps)

    views = [view(224, GLOBAL, 1.0), view(224, GLOBAL, 0.1, 0.2), *[view(96, LOCAL, 0.5)] * 8]
    return lambda image: [one(image) for one in views]


def torchvision_mae() -> Callable:
    crop = v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC, antialias=True)
    floats = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), floats, v2.Normalize(MEAN, STD)])


def torchvision_dino() -> Callable:
    """The same on uint8 tensors; a kernel of 15 holds the official blur's largest sigma."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> Callable:
        steps = [
            v2.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(15, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
        return v2.Compose(steps)

    views = [view(224, GLOBAL, 1.0), view(224, GLOBAL, 0.1, 0.2), *[view(96, LOCAL, 0.5)] * 8]
    return lambda image: [one(image) for one in views]


if __name__ == "__main__":
    raise SystemExit(main())
