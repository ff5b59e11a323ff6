// One function compiled for several x86 levels, the best one chosen when the library is loaded. For leaf functions
// outside OpenMP regions only. Not under AddressSanitizer, which is not ready when the choice is made.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
#define DIT_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DIT_FAST_CLONES
#endif
