"""llama.cpp, as the service sees it: a model, its vocabulary, and contexts that decode batches.

The only files of the service that call ``llama_cpp``. Arrays that cross the border are NumPy views of llama.cpp's own
memory, or memory of ours that llama.cpp reads; nothing is copied token by token.
"""
