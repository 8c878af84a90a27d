"""Where bytes come from: files, block devices, NBD servers; and which of them may be opened."""
