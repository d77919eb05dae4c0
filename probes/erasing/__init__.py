"""What erasing a concept does: to states, to the model while it runs, to the layers above; and steering along it."""
