"""What ``generate()`` means, in NumPy: knows neither llama.cpp nor HTTP."""
