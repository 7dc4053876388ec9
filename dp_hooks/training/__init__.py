"""A user's step, from zero_grad to the update: scope, decorated functions, optimizer."""
