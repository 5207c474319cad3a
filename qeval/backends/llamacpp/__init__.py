"""llama.cpp through llama-cpp-python, an extra: imported only when it is asked for."""
