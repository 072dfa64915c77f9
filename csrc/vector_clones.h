// One function, compiled for every kind of x86-64 CPU and chosen when it is loaded: a build serves all nodes of a cluster.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTOR_CLONES
#endif
