"""Fits and calibrates the predictors of one layer at a time, from arrays. Walks no model; what runs them is the engine."""
