"""The verbs of the ``edge-phi3`` command, one module each: it parses, calls one function, and prints."""
