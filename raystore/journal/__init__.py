"""The journal: what a store did, on disk, so that the next process goes on exactly where it was.

A `recorder` makes records, in the form that `format` says; a `writer` commits them to the segments of a directory
(`files`). A `reader` finds them again, and `replay` makes the state anew, through the same core. Now and then a
helper process replaces old segments by a snapshot (`compaction`, `snapshot_file`).
"""
