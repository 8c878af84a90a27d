"""Everything that writes: copies, chains, and what must be true of their targets."""
