"""Predictors, selection rules, activation functions and sparsity metrics, shared by the converter and the runtime."""
