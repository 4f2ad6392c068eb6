"""How a family's checkpoint maps to a pack, and the model definitions that run it. One file per family."""
