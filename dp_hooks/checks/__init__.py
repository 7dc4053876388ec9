"""What is verified before anything is released, and why a model is refused."""
