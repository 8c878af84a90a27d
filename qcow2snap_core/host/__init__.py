"""Other programs on this machine: nbdkit, QEMU's monitor, FUSE and filesystem programs."""
