"""Random images by seed, and everything that this program says of them held against QEMU.

A seed gives a :class:`.Program`: the layers of a chain and the commands of QEMU's tools that make
and change them, as plain command lines, so that it can be printed, replayed and cut down.  When it
has run, :class:`.World` asks QEMU what is there now, and each of the comparisons asks us.  Nothing
is expected of the program itself: a step that QEMU refuses is left out by QEMU, and whatever image
comes of the others is the one that both are asked about.

    geometry      the layers: cluster sizes, features, encryption, sizes
    program       the commands; steps: those that are our own
    world         what QEMU says: every state's content and map, what a check finds
    reading       comparisons: bytes, extents, maps, differences, listing, VM states
    judging       comparisons: check, exclusive sizes
    writing       comparisons: copy, copy --since, split, join, backup
    serving       comparisons: nbdkit, remote images, block devices
    seeds         one seed from its directory to its verdict; cutting a failing one down
"""
