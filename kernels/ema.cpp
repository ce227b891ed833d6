// Teacher update on a CPU: t = m * t + (1 - m) * s over a list of tensors, one pass over memory.
#include <omp.h>

#include "simd.h"

namespace {

constexpr int64_t CHUNK = 16384;

template <class T, class S>
void update(T* t, const S* s, bf16* copy, int64_t n, float weight) {
    // from the nearer end, as torch.lerp: exact at both
    const auto lerp = [weight](vf a, vf b) {
        return weight < 0.5f ? a + weight * (b - a) : b - (1 - weight) * (b - a);
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf x = lerp(load(t + i), load(s + i));
        store(t + i, x);
        if (copy) store(copy + i, x);
    }
    if (i == n) return;
    const vf x = lerp(load_part(t + i, n - i), load_part(s + i, n - i));
    store_part(t + i, x, n - i);
    if (copy) store_part(copy + i, x, n - i);
}

void update(void* t, const void* s, void* copy, int64_t from, int64_t n, int half, float weight) {
    float *tf = static_cast<float*>(t) + from;
    bf16 *th = static_cast<bf16*>(t) + from;
    const float* sf = static_cast<const float*>(s) + from;
    const bf16* sh = static_cast<const bf16*>(s) + from;
    bf16* c = copy ? static_cast<bf16*>(copy) + from : nullptr;
    switch (half) {
        case 0: return update(tf, sf, c, n, weight);
        case 1: return update(th, sf, c, n, weight);
        case 2: return update(tf, sh, c, n, weight);
        default: return update(th, sh, c, n, weight);
    }
}

inline int64_t chunks(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

}  // namespace

// count tensors of sizes[i] contiguous elements. half[i]: bit 0 says that the teacher's is bfloat16, bit 1 that the
// student's is; else float32. weight is 1 - m. copies: null, or a bfloat16 tensor for each, set to the new teacher.

EXPORT(fastdino_ema)(
    void* const* teacher, const void* const* student, void* const* copies, const int64_t* sizes, const int32_t* half,
    int64_t count, float weight, int threads
) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += chunks(sizes[i]);
#pragma omp parallel num_threads(threads)
    {
        const int64_t id = omp_get_thread_num(), all_threads = omp_get_num_threads();
        const int64_t begin = total * id / all_threads, end = total * (id + 1) / all_threads;
        int64_t first = 0;  // chunk number at which tensor i starts
        for (int64_t i = 0; i < count && first < end; first += chunks(sizes[i++])) {
            const int64_t from = begin > first ? (begin - first) * CHUNK : 0;
            const int64_t to = (end - first) * CHUNK < sizes[i] ? (end - first) * CHUNK : sizes[i];
            if (from < to)
                update(teacher[i], student[i], copies ? copies[i] : nullptr, from, to - from, half[i], weight);
        }
    }
}
