"""Training: recipe → batches → loader → trainer → checkpoints. Everything but weights and optimizer follows from
(recipe, step)."""
