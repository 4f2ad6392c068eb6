"""The engine on an Apple GPU: choosing, streaming and keeping in memory that host and GPU share. Needs MLX."""
