"""Which hooks sit where, and what they keep: calls of the model and of its modules, and the backward passes over them."""
