"""How much memory there is, and how much this process holds."""
