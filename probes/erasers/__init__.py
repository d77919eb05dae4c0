"""What removes a concept from states: affine maps, fitted to rows and labels, or to moments of them."""
