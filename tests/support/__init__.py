"""What the tests share: images that QEMU made, a real nbdkit, QEMU's own answers."""
