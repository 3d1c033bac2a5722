"""A small file's shapes, for what is reckoned by hand."""

from runtime_checks.shapes import Shapes

SHAPES = Shapes(
    weights=1000,
    embedding=100,
    shared=True,
    rotations=0,
    matrices=300,
    layers=2,
    heads=6,
    kv_heads=3,
    head_dim=4,
    hidden=5,
    ffn=7,
    vocab=11,
)
