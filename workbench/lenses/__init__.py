"""Lenses: what a state in the middle of a model says of the output, by a map to the last state and the model's own head."""
