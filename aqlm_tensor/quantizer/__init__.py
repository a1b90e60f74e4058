"""From a dense weight to codes, codebooks and scales."""
