"""What a model will take of a machine's memory, told before it is downloaded, quantised or loaded."""
