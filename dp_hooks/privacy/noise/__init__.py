"""Noise on the clipped sum, and the random numbers it is drawn from."""
