"""Published formats of questions about images: one function a format, which reads the files as a `reading.Source` of queries."""
