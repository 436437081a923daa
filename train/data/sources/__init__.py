"""Training data in the formats that people have: each is a ``Source`` of records and of the pictures in them."""
