"""What a model will take of a machine's memory, predicted before it is downloaded, quantised or loaded."""
