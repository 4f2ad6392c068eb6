"""Tests, by what they need: unit (Python and numpy), native (the C++ library), mlx, model (whole models)."""
