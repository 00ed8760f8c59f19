/* Which of the variants this processor can run, and from which sources the library was built; compiled once. */

#include <string.h>

__attribute__((visibility("default"))) int neural_layers_cpu_runs(const char *variant) {
    if (!strcmp(variant, "baseline")) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(variant, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(variant, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
    return 0;
}

__attribute__((visibility("default"))) const char neural_layers_sources[] = SOURCES;
