"""The identities that the names of sites and weights promise. `workbench.verification` runs them.

Every identity compares tensors as they were kept, so a block that changes one in place afterwards is found out too.
Errors are relative to the norm of the row (a state of SmolLM2 reaches 22,552: an absolute 1e-5 would mean nothing).
"""
