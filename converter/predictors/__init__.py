"""Fits and calibrates predictors, one layer at a time, from arrays. Walks no model; the engine runs what comes out."""
