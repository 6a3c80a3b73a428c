"""How equal two implementations are: what is compared, what is allowed, and the record of it."""
