"""TransformerLens and nnsight: their models taken in, captures handed out, their machinery used. Imported when asked for."""
