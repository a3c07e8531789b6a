"""How much memory there is, and how much this process holds: asked of the system, no package needed."""
