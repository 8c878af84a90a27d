"""Every order in which the guard's reads and QEMU's writes can meet, tried in memory.

The tests in `live/` have a real QEMU and meet the moments that come up.  Here a history is made
first, as a list of the writes that QEMU would make (:mod:`.writes`); an image in memory gives each
single read of ours what the file holds after some of these writes, or after half of one
(:mod:`.memory`); and a reader of our own classes has to get the snapshot's bytes or be told that
it is gone (:mod:`.reader`).  All choices come from one seed.  That the simulation can see a hole is
shown by leaving out each part of the guard in turn (:mod:`.left_out`).

What is assumed of the machine, and nowhere made sure of:

- *The order.*  Writes with a flush between them are seen in this order; all others in any.
- *Half a write* is seen for no longer than a pause or two of the guard's, some 10 ms.
- *No lookalike that stays.*  Half a header, the count of one and the offset of another, can lead to
  a table behind which the entry of a deleted snapshot was left standing, and be the header of that
  snapshot's days again.  That is assumed to be seen by one read, and no longer by the next; if the
  writer is held up just then, the guard cannot tell (docs/live.md, "What is not covered", and a
  test that is expected to fail).
"""
