"""Pictures of results. They compute nothing, so a notebook, a page and the app show the same numbers."""
