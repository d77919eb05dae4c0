"""Linear maps between sites: fitted from second moments, scored on other documents, applied, composed, saved."""
