"""State saved by any number of ranks, cut anywhere, is read in any other cut."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain.core.manifest import HashedFile
from pretrain.core.tensorfile import write_tensors
from pretrain.engine.checkpoint.commit import verify_files
from pretrain.engine.optim.fragments import Fragment, SavedState, restore_state, state_ranges, state_tensors

SIZES = {"a": 7, "b": 1, "c": 12}
TOTAL = sum(SIZES.values())


def layout(cuts: list[int]) -> list[list[Fragment]]:
    """Fragments by rank, when the parameters one after the other are cut at `cuts`, as ZeRO does."""
    edges = [0, *sorted(cuts), TOTAL]
    ranks = []
    for low, high in pairwise(edges):
        owner, at, fragments = torch.zeros(high - low), 0, []
        for name, size in SIZES.items():
            start, stop = max(at, low), min(at + size, high)
            if start < stop:
                fragments.append(Fragment(name, 0, size, start - at, stop - at, owner, start - low))
            at += size
        ranks.append(fragments)
    return ranks


def optimizer_of(fragments: list[Fragment]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [fragments[0].owner]}] if fragments else [{"params": []}])


def whole(optimizers: list, ranks: list[list[Fragment]]) -> dict[str, list[float]]:
    """exp_avg of each parameter, pieced together."""
    found = {name: [float("nan")] * size for name, size in SIZES.items()}
    for optimizer, fragments in zip(optimizers, ranks, strict=True):
        for f in fragments:
            found[f.name][f.start : f.stop] = f.of(optimizer.state[f.owner]["exp_avg"]).tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.integers(0, TOTAL), max_size=4),
    after=st.lists(st.integers(0, TOTAL), max_size=4),
)
def test_any_layout_reads_what_any_other_wrote(before, after):
    numbers = torch.arange(1.0, TOTAL + 1)
    with tempfile.TemporaryDirectory() as folder:
        files, at = [], 0
        writers = layout(before)
        edges = [0, *sorted(before), TOTAL]
        for rank, fragments in enumerate(writers):
            optimizer = optimizer_of(fragments)
            if fragments:
                state = {"exp_avg": numbers[edges[rank] : edges[rank + 1]].clone(), "step": torch.tensor(5.0)}
                optimizer.state[fragments[0].owner] = state
            files.append(Path(folder) / f"optim-rank{rank}")
            write_tensors(files[-1], state_tensors(optimizer, fragments), state_ranges(fragments))
        readers = layout(after)
        optimizers = [optimizer_of(fragments) for fragments in readers]
        for optimizer, fragments in zip(optimizers, readers, strict=True):
            restore_state(optimizer, fragments, SavedState(files))
        expected = {}
        for name, size in SIZES.items():
            expected[name] = numbers[at : at + size].tolist()
            at += size
        assert whole(optimizers, readers) == expected
        for optimizer, fragments in zip(optimizers, readers, strict=True):
            assert all(optimizer.state[f.owner]["step"] == 5 for f in fragments)


def test_a_lost_rank_file_leaves_a_hole_that_is_named(tmp_path):
    writers = layout([10])
    for rank, fragments in enumerate(writers):
        optimizer = optimizer_of(fragments)
        optimizer.state[fragments[0].owner] = {"exp_avg": fragments[0].owner + 1.0}
        write_tensors(tmp_path / str(rank), state_tensors(optimizer, fragments), state_ranges(fragments))
    reader = layout([])[0]
    with pytest.raises(ValueError, match="exp_avg/c: only 2 of 12 elements"):
        restore_state(optimizer_of(reader), reader, SavedState([tmp_path / "0"]))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_written_tensors_are_read_by_the_library(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).t().to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "byte": torch.tensor([3], dtype=torch.uint8),
    }
    receipt = write_tensors(tmp_path / "file", tensors, {"note": "é"})
    verify_files(tmp_path, [receipt])
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="phase: cannot save dtype"):
        write_tensors(tmp_path / "file", {"phase": torch.zeros(2, dtype=torch.complex64)})


def test_a_large_write_in_many_pieces_has_the_hash_of_the_whole(tmp_path):
    with HashedFile(tmp_path / "large") as file:
        for piece in range(5):
            file.write(bytes([piece]) * (7 << 20))
        file.write(bytes(40 << 20))
    assert file.record.size == 75 << 20
    verify_files(tmp_path, [file.record])
