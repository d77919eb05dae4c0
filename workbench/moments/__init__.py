"""Second moments of activations: sums that add, from which every linear map between sites follows."""
