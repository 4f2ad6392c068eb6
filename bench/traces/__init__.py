"""Which records a real run needs, recorded; and what slot policies would have made of it."""
