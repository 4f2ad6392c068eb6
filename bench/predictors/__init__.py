"""What predictors cost and keep, on a real checkpoint: the whole frontier, top-k against threshold, prefetch hints."""
