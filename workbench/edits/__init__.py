"""Edits: what to do to the tensor at a site, as values that are saved and read again."""
