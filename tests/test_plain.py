"""Checkpoints made plain: the same model without pivots, read one matrix at a time."""

from pathlib import Path

import pytest
import torch
from layouts import MIXED, checkpoint_with

from sola_edge.checkpoint import open_checkpoint
from sola_edge.layers import recompose
from sola_edge.plain import plain, plain_layout
from sola_edge.testing import tiny_checkpoint


@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_checkpoint_stands_for_the_same_matrices(bias: bool, tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint_with(tmp_path / "checkpoint", MIXED, bias=bias))
    made = plain(source)
    assert any(layout.pivot for layout in source.layout.values())
    assert not any(layout.pivot or layout.gather for layout in made.layout.values())
    assert made.layout.keys() == source.layout.keys()
    for module, layout in source.layout.items():
        stored = {part: source.tensor(f"{module}.{part}") for part in layout.shapes}
        found = {part: made.tensor(f"{module}.{part}") for part in made.layout[module].shapes}
        assert {part: tuple(value.shape) for part, value in found.items()} == made.layout[module].shapes
        whole = recompose(layout, stored)
        assert torch.allclose(recompose(made.layout[module], found), whole, atol=1e-5 * float(whole.abs().max()))
    shapes = {name: made.shape(name) for name in made.names()}
    assert made.parameters() == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert {name: tuple(made.tensor(name).shape) for name in made.names()} == shapes
    assert made.bias_name("model.layers.1.self_attn.o_proj") == source.bias_name("model.layers.1.self_attn.o_proj")


def test_a_high_rank_is_stored_whole() -> None:
    """r (m + n - r) parameters can be fewer than m n where r (m + n) are not."""
    high = MIXED[2, "o"]  # rank 40 of 64 × 64, pivoted
    assert high.weights < 64 * 64 and plain_layout(high).rank == 0


def test_what_has_no_pivots_is_itself(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "checkpoint", compressed=True, layers=3))
    assert plain(source) is source
