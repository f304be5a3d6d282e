"""How is a file stored? safetensors and pickles: bytes, headers, limits."""
