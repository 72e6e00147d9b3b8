"""`benchmarks/scale.py` reads from compiled programs what it says."""

import pytest

from benchmarks import scale

pytestmark = pytest.mark.usefixtures("quick_compiling")


def test_collectives_of_a_program_are_counted_with_the_bytes_of_their_results() -> None:
    text = """
  %all-reduce.1 = (f32[784,1024]{1,0}, /*index=1*/f32[1024]{0}) all-reduce(%a, %b), channel_id=1
  %all-reduce.2 = f32[] all-reduce(%c), channel_id=2
  ROOT %all-gather-start.3 = bf16[8,16]{1,0} all-gather-start(%d), dimensions={0}
  %other = f32[99]{0} fusion(%all-reduce.2), calls=%all-reduce-like
"""
    assert scale.collectives(text) == {"all-reduce": (2, 4 * (784 * 1024 + 1024 + 1)), "all-gather": (1, 256)}


def test_one_device_sends_nothing(standard_promotion: None) -> None:
    found = scale.measured(scale.WAYS[0], 1, 8, "weak")
    assert found.collectives == {}
    # The student's parameters and two moments, at least.
    assert found.held > 3 * found.parameters
