"""What any program could use: threads, buffers, progress, signals, sizes.  No word of qcow2."""
