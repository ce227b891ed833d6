// The instruction sets that the kernels were compiled for and this machine runs, best first.

extern "C" __attribute__((visibility("default"))) const char* fastdino_isas() {
#if defined(FASTDINO_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512bf16 avx512 avx2 baseline";
    return avx512 ? "avx512 avx2 baseline" : avx2 ? "avx2 baseline" : "baseline";
#else
    return "baseline";
#endif
}
