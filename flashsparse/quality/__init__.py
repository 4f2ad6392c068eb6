"""How good a pack is: what it loses against the dense model on given text, and the record of that beside the pack."""
