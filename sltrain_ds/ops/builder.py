"""Find or build the C++ ops."""

CXX_FLAGS = ["-O3", "-std=c++17", "-fopenmp"]
LINK_FLAGS = ["-fopenmp"]


def load():
    return False
