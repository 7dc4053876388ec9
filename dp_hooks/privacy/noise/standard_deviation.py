"""How large the noise is."""


def standard_deviation(noise_multiplier: float, sensitivity: float) -> float:
    """Return the standard deviation of the Gaussian noise on a sum, in the sum's own units: ``noise_multiplier * sensitivity``.

    ``sensitivity`` is the largest Euclidean norm, over all parameters together, that one example can add to the sum. Noise of
    this size on every coordinate makes the sum a Gaussian mechanism with that noise multiplier (Abadi et al., CCS 2016,
    algorithm 1). What the noised sum is divided by afterwards divides its noise as well, and is no matter of privacy.
    """
    return noise_multiplier * sensitivity
