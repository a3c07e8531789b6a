"""Orders blocks by their importance into the universal stack."""
