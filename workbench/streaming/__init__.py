"""A corpus through a model, batch after batch, in memory that does not depend on the corpus's length."""
