"""How the norms and sums of per-sample gradients are made from what was captured, without knowing who captured it."""
