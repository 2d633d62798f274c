"""``bench compare``: the working tree beside a base revision, in processes of their own."""
