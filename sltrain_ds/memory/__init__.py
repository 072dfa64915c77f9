"""Memory of a run: counted before it starts (`estimate`), and by the paper's own rule (`paper`)."""
