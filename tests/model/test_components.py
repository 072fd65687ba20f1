"""Parameters by component."""

from mirasol.config.components import COMPONENTS


def test_every_parameter_belongs_to_one_component(model):
    counts = model.num_params()
    assert tuple(counts) == COMPONENTS
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["vocabulary"] == model.text.embedding.weight.numel()
