"""Gradients of weight matrices as the factors that make them: nothing of the size of a matrix is formed."""
