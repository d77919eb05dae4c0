"""What a probe's score is worth: held out, beside its controls."""
