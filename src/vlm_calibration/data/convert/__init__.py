"""Published formats of questions about images, read once and converted to queries: one function a format.

A format's function yields, for each record of its files, the record's place and a function that returns its queries as objects.
`writing.QueryWriter` calls that function, checks what it returns, names what is wrong, and writes JSON lines.
"""
