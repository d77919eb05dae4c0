"""Where Hugging Face's models keep their parts. The only package that knows their attribute paths.

`cuts` and `row` say what a row is, `families` holds the rows, `taps` says where each site is read, `weights` reads what the
modules hold, `guess` makes rows of families that have none.
"""
