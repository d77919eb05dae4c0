"""Activations on disk: written while the model runs, resumed after any interruption, read in slices or shuffled."""
