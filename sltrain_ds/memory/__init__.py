"""Memory of a run: estimated before it starts (`estimate`), and counted by the paper's rule (`paper`)."""
