"""The pack format: its manifest, safetensors headers, checksums and description. Runs no model and imports no MLX."""
