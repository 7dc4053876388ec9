"""Training in several processes; so far only how many there are."""
