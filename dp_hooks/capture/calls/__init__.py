"""What is going on in a model: the call that runs, what is swapped meanwhile, and the backward passes that come back."""
