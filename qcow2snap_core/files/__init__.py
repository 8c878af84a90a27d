"""The files inside a snapshot: partitions, filesystems, and what is taken out of them."""
