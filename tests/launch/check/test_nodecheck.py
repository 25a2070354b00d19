"""Among equal nodes the one that is slow, wrong or different is named."""

from __future__ import annotations

from dataclasses import replace

from launch.check.nodecheck import NodeReport, check_nodes, is_broken, judge

GOOD = NodeReport(
    rank=0,
    node="n1",
    device="H200",
    driver="570",
    versions={"torch": "2.15.0"},
    clock=100.0,
    product=700.0,
    product_error=2e-3,
    sum_error=0.0,
    reduce=300.0,
)
REPORTS = [replace(GOOD, rank=rank, node=f"n{rank // 2 + 1}") for rank in range(8)]


def with_rank_5(**different: object) -> list[NodeReport]:
    return [replace(report, **different) if report.rank == 5 else report for report in REPORTS]  # pyright: ignore


def test_equal_nodes_are_not_remarked_upon():
    assert judge(REPORTS) == ([], [])


def test_a_slow_rank_is_a_warning_with_its_node():
    errors, (warning,) = judge(with_rank_5(product=420.0))
    assert not errors and warning.startswith("n3 (rank 5): products at 420 TFLOP/s, the median is 700")


def test_a_node_that_computes_wrongly_is_an_error():
    for wrong in ({"product_error": 0.3}, {"product_error": float("inf")}, {"sum_error": 1.0}):
        reports = with_rank_5(**wrong)
        (error,), _ = judge(reports)
        assert error.startswith("n3 (rank 5)") and "exclude the node" in error
        assert [report.rank for report in reports if is_broken(report)] == [5]


def test_other_versions_drivers_and_clocks_are_named():
    warnings = judge(with_rank_5(versions={"torch": "2.14.0"}, driver="550", clock=160.0))[1]
    assert "torch: n3 has 2.14.0, the others 2.15.0; install the same on all" in warnings
    assert "driver: n3 has 550, the others 570; install the same on all" in warnings
    assert "n3: its clock is +60 s off; time limits depend on it" in warnings


def test_this_machine_passes(capsys):
    assert check_nodes(device="cpu") == 0
    assert "1 with 1 ranks" in capsys.readouterr().out
