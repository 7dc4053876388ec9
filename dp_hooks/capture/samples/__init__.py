"""Which rows of a tensor belong to which sample, also where parameters meet the batch outside a layer rule."""
