"""Plain reference kernels, and their C counterparts where those are built."""
