// DINO loss on a CPU, forward and backward. Formulas and letters: fastdino/ops/dino_loss.py.
//
// The columns are cut into tiles that stay near the core, so that the teacher's probabilities are computed once and serve
// all crops. The forward reads each logit once: every tile yields maximum, sum and <q, x> relative to its own maxima, and
// these partial results are merged in the order of the tiles. So nothing depends on the number of threads.
#include <math.h>
#include <omp.h>

#include "simd.h"

namespace {

constexpr int64_t TILE = 4096;
constexpr float LOG2E = 1.4426950408889634f;
constexpr int64_t STREAM_ABOVE = 16 << 20;  // bytes of gradient that no cache would keep for the next reader

struct Sizes {
    int64_t V, G, B, K;
    int64_t tiles() const { return (K + TILE - 1) / TILE; }
    int64_t width(int64_t tile) const { return K - tile * TILE < TILE ? K - tile * TILE : TILE; }
};

// Logits (crops, B, K): strides in elements, the last axis contiguous.
template <class T>
struct Logits {
    T* data;
    int64_t crop, image;
    T* at(int64_t c, int64_t b, int64_t k) const { return data + c * crop + b * image + k; }
};

// The row that is read next. It lies a stride away, where no hardware prefetcher looks.
struct Next {
    const char* row;
    int64_t element;
    template <class T>
    explicit Next(const T* p) : row(reinterpret_cast<const char*>(p)), element(sizeof(T)) {}
    void prefetch(int64_t i) const { __builtin_prefetch(row + i * element, 0, 2); }
};

// Partial results; the tile is the last axis.
struct Partial {
    float *student_top, *student_sum;  // (B, V, tiles)
    float *teacher_top, *teacher_sum;  // (B, G, tiles)
    float* dot;                        // (B, V, G, tiles)
    float *column_sum, *center;        // (tiles * TILE,), padded to whole vectors
    float* scratch;                    // (threads, scratch_size)
    static int64_t size(const Sizes& s) { return s.tiles() * (s.B * (2 * s.V + 2 * s.G + s.V * s.G) + 2 * TILE); }
    static int64_t scratch_size(const Sizes& s) { return (s.G + 2) * TILE + s.tiles(); }
    Partial(float* p, const Sizes& s) {
        const int64_t rows = s.B * s.tiles();
        student_top = p;
        student_sum = student_top + rows * s.V;
        teacher_top = student_sum + rows * s.V;
        teacher_sum = teacher_top + rows * s.G;
        dot = teacher_sum + rows * s.G;
        column_sum = dot + rows * s.V * s.G;
        center = column_sum + s.tiles() * TILE;
        scratch = p + size(s);
    }
};

template <class T>
inline float maximum(const T* p, int64_t n) {
    vf top[4] = {all(LOWEST), all(LOWEST), all(LOWEST), all(LOWEST)};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int j = 0; j < 4; j++) top[j] = larger(load(p + i + j * W), top[j]);
    each(p + i, n - i, [&](vf x, int64_t) { top[0] = larger(x, top[0]); });
    return largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// Sum of exp((x - top) / temp), and of e * (x - top) for N rows e of the teacher.
template <int N, class S>
inline void sums(
    const S* p, int64_t n, float top, float scale, const float* const* e, float* total, float* dot, Next next
) {
    vf totals[2] = {}, dots[N][2] = {};
    const auto step = [&](vf x, int64_t i, int j) {
        next.prefetch(i);
        const vf shifted = x - top;
        totals[j] += pow2(shifted * scale);
        for (int g = 0; g < N; g++) dots[g][j] += load(e[g] + i) * shifted;
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        step(load(p + i), i, 0);
        step(load(p + i + W), i + W, 1);
    }
    each(p + i, n - i, [&](vf x, int64_t k) { step(x, i + k, 0); });
    *total = sum(totals[0] + totals[1]);
    for (int g = 0; g < N; g++) dot[g] = sum(dots[g][0] + dots[g][1]);
}

// One image's part of a tile.
template <class S, class T>
void forward_tile(
    const Partial& out, Logits<const S> student, Logits<const T> teacher, float student_scale, float teacher_scale,
    const Sizes& s, int64_t b, int64_t tile, float* e
) {
    const int64_t k = tile * TILE, n = s.width(tile), tiles = s.tiles();
    for (int64_t g = 0; g < s.G; g++) {
        const Next next = g + 1 < s.G ? Next(teacher.at(g + 1, b, k)) : Next(student.at(0, b, k));
        float* row = e + g * TILE;
        vf tops = all(LOWEST), totals = {};
        each(teacher.at(g, b, k), n, [&](vf t, int64_t i) {
            store(out.column_sum + k + i, load(out.column_sum + k + i) + t);
            t -= load(out.center + k + i);
            store(row + i, t);
            tops = larger(t, tops);
        });
        const float top = largest(tops);
        for (int64_t i = 0; i < n; i += W) {
            next.prefetch(i);
            const vf x = pow2((load(row + i) - top) * teacher_scale);
            store(row + i, x);
            totals += x;
        }
        const int64_t at = (b * s.G + g) * tiles + tile;
        out.teacher_top[at] = top;
        out.teacher_sum[at] = sum(totals);
    }
    for (int64_t v = 0; v < s.V; v++) {
        const S* p = student.at(v, b, k);
        const Next next = v + 1 < s.V ? Next(student.at(v + 1, b, k)) : Next(teacher.at(0, b, k + n));
        const float top = maximum(p, n);
        const int64_t row = b * s.V + v;
        out.student_top[row * tiles + tile] = top;
        for (int64_t g = 0; g < s.G; g += 2) {
            const float* pair[2] = {e + g * TILE, e + (g + 1) * TILE};
            float* total = out.student_sum + row * tiles + tile;
            float dot[2];
            if (g + 1 < s.G)
                sums<2>(p, n, top, student_scale, pair, total, dot, next);
            else
                sums<1>(p, n, top, student_scale, pair, total, dot, next);
            for (int64_t j = 0; j < 2 && g + j < s.G; j++)
                out.dot[(row * s.G + g + j) * tiles + tile] = dot[j];
        }
    }
}

// Maximum and sum of a row; `factor` gets what the sum of each tile is multiplied by.
inline void merge_row(
    float* top, float* total, float* factor, const float* tops, const float* totals, float scale, int64_t tiles
) {
    *top = tops[0], *total = 0;
    for (int64_t t = 1; t < tiles; t++) *top = tops[t] > *top ? tops[t] : *top;
    for (int64_t t = 0; t < tiles; t++) {
        factor[t] = exp2f((tops[t] - *top) * scale);
        *total += totals[t] * factor[t];
    }
}

// Statistics of an image's rows; returns its weighted sum over the pairs of crops.
double merge_image(
    float* student_stats, float* teacher_stats, const Partial& partial, float student_temp, float teacher_temp,
    const float* weights, const Sizes& s, int64_t b, float* factor
) {
    const int64_t tiles = s.tiles();
    float top, total;
    for (int64_t g = 0; g < s.G; g++) {
        float* tops = partial.teacher_top + (b * s.G + g) * tiles;
        float* totals = partial.teacher_sum + (b * s.G + g) * tiles;
        merge_row(&top, &total, factor, tops, totals, LOG2E / teacher_temp, tiles);
        for (int64_t t = 0; t < tiles; t++) {
            tops[t] = factor[t] / total;   // from now on what turns an e of the tile into q
            totals[t] = totals[t] * tops[t];  // and the sum of the tile's q
        }
        teacher_stats[g * s.B + b] = top;
        teacher_stats[(s.G + g) * s.B + b] = total;
    }
    double loss = 0;
    for (int64_t v = 0; v < s.V; v++) {
        const int64_t row = b * s.V + v;
        const float* tops = partial.student_top + row * tiles;
        merge_row(&top, &total, factor, tops, partial.student_sum + row * tiles, LOG2E / student_temp, tiles);
        student_stats[v * s.B + b] = top;
        student_stats[(s.V + v) * s.B + b] = total;
        for (int64_t g = 0; g < s.G; g++) {
            if (weights[v * s.G + g] == 0) continue;  // a pair that is left out may hold NaN
            const float* to_q = partial.teacher_top + (b * s.G + g) * tiles;
            const float* q_sum = partial.teacher_sum + (b * s.G + g) * tiles;
            const float* dots = partial.dot + (row * s.G + g) * tiles;
            double dot = 0;  // <q, s - top>
            for (int64_t t = 0; t < tiles; t++)
                dot += double(to_q[t]) * dots[t] + double(q_sum[t]) * (double(tops[t]) - top);
            loss += weights[v * s.G + g] * (logf(total) - dot / student_temp);
        }
    }
    return loss;
}

template <class S, class T>
void forward(
    float* loss, float* student_stats, float* teacher_stats, float* mean, float* workspace, double* losses,
    Logits<const S> student, Logits<const T> teacher, const float* center, const float* weights, float student_temp,
    float teacher_temp, const Sizes& s, int threads
) {
    const Partial partial(workspace, s);
    // a run of tiles for all images: long rows spare the translation of addresses, several runs a thread even out
    const int64_t tiles = s.tiles(), runs = tiles < 4 * threads ? tiles : 4 * threads;
#pragma omp parallel num_threads(threads)
    {
        float* scratch = partial.scratch + omp_get_thread_num() * Partial::scratch_size(s);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < runs; i++) {
            const int64_t first = tiles * i / runs, last = tiles * (i + 1) / runs;
            const int64_t from = first * TILE, to = last * TILE < s.K ? last * TILE : s.K;
            for (int64_t k = from; k < last * TILE; k++)
                partial.column_sum[k] = 0, partial.center[k] = k < to ? center[k] : 0;
            for (int64_t b = 0; b < s.B; b++)
                for (int64_t t = first; t < last; t++)
                    forward_tile(
                        partial, student, teacher, LOG2E / student_temp, LOG2E / teacher_temp, s, b, t, scratch
                    );
            for (int64_t k = from; k < to; k++) mean[k] = partial.column_sum[k] / float(s.G * s.B);
        }
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < s.B; b++)
            losses[b] = merge_image(
                student_stats, teacher_stats, partial, student_temp, teacher_temp, weights, s, b, scratch
            );
    }
    double total = 0, pairs = 0;
    for (int64_t b = 0; b < s.B; b++) total += losses[b];
    for (int64_t i = 0; i < s.V * s.G; i++) pairs += weights[i];
    *loss = total / (pairs * s.B);
}

template <class F>
inline void dispatch(int half, F run) {
    switch (half) {
        case 0: return run(float{}, float{});
        case 1: return run(bf16{}, float{});
        case 2: return run(float{}, bf16{});
        default: return run(bf16{}, bf16{});
    }
}

// Weighted sum of the teacher's rows q of a tile.
inline void combine(float* sum, const float* q, const float* weight, int64_t G) {
    bool first = true;
    for (int64_t g = 0; g < G; g++) {
        const float w = weight[g];
        if (w == 0) continue;  // a pair that is left out may hold NaN
        const float* row = q + g * TILE;
        if (first)
            for (int64_t i = 0; i < TILE; i += W) store(sum + i, w * load(row + i));
        else
            for (int64_t i = 0; i < TILE; i += W) store(sum + i, load(sum + i) + w * load(row + i));
        first = false;
    }
}

// One row of the gradient: share * exp((x - top) / temp) - taught. The row's sum is in `share`: as a logarithm in the
// exponent it would cost the digits of log2(K).
template <bool STREAM, class S>
inline void gradient_row(
    S* out, const S* p, int64_t n, float top, float temp_scale, float share, const float* taught, Next next
) {
    const auto gradient = [&](vf x, int64_t i) {
        return share * pow2((x - top) * temp_scale) - load(taught + i);
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        next.prefetch(i);
        const vf y = gradient(load(p + i), i);
        if (STREAM)
            stream(out + i, y);
        else
            store(out + i, y);
    }
    if (i < n) store_part(out + i, gradient(load_part(p + i, n - i), i), n - i);
}

template <bool STREAM, class S, class T>
void backward_tile(
    Logits<S> out, Logits<const S> student, Logits<const T> teacher, const float* center, const float* weights,
    const float* student_stats, const float* teacher_stats, float student_scale, float teacher_scale, float scale,
    const Sizes& s, int64_t b, int64_t tile, float* scratch
) {
    const int64_t k = tile * TILE, n = s.width(tile);
    float* c = scratch;
    float* q = c + TILE;
    for (int64_t i = 0; i < TILE; i++) c[i] = i < n ? center[k + i] : 0;
    for (int64_t g = 0; g < s.G; g++) {
        const Next next = g + 1 < s.G ? Next(teacher.at(g + 1, b, k)) : Next(student.at(0, b, k));
        const float top = teacher_stats[g * s.B + b], share = scale / teacher_stats[(s.G + g) * s.B + b];
        each(teacher.at(g, b, k), n, [&](vf t, int64_t i) {
            next.prefetch(i);
            store(q + g * TILE + i, share * pow2((t - load(c + i) - top) * teacher_scale));
        });
    }
    float* taught = q + s.G * TILE;
    for (int64_t v = 0; v < s.V; v++) {
        const float* weight = weights + v * s.G;
        float own = 0;
        bool paired = false;
        for (int64_t g = 0; g < s.G; g++) own += weight[g], paired |= weight[g] != 0;
        S* to = out.at(v, b, k);
        const S* p = student.at(v, b, k);
        if (!paired) {
            memset(to, 0, n * sizeof(S));
            continue;
        }
        if (v == 0 || memcmp(weight, weight - s.G, s.G * sizeof(float))) combine(taught, q, weight, s.G);
        const Next next = v + 1 < s.V ? Next(student.at(v + 1, b, k)) : Next(p);
        const float top = student_stats[v * s.B + b], share = own * scale / student_stats[(s.V + v) * s.B + b];
        gradient_row<STREAM>(to, p, n, top, student_scale, share, taught, next);
    }
}

template <bool STREAM, class S, class T>
void backward(
    Logits<S> out, Logits<const S> student, Logits<const T> teacher, const float* center, const float* weights,
    const float* student_stats, const float* teacher_stats, float* workspace, float student_temp, float teacher_temp,
    float upstream, const Sizes& s, int threads
) {
    double pairs = 0;
    for (int64_t i = 0; i < s.V * s.G; i++) pairs += weights[i];
    const float scale = upstream / (pairs * s.B * student_temp);
    const int64_t tiles = s.tiles();
#pragma omp parallel num_threads(threads)
    {
        float* scratch = workspace + omp_get_thread_num() * Partial::scratch_size(s);
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < s.B * tiles; i++)
            backward_tile<STREAM>(
                out, student, teacher, center, weights, student_stats, teacher_stats, LOG2E / student_temp,
                LOG2E / teacher_temp, scale, s, i / tiles, i % tiles, scratch
            );
        if (STREAM) stream_end();
    }
}

template <class S>
bool can_stream(const Logits<S>& out, const void* student, const Sizes& s) {
    constexpr int64_t line = W * sizeof(S);
    const bool aligned = reinterpret_cast<uintptr_t>(out.data) % line == 0 && out.crop * sizeof(S) % line == 0 &&
                         out.image * sizeof(S) % line == 0;
    return aligned && out.data != student && s.V * s.B * s.K * int64_t(sizeof(S)) > STREAM_ABOVE;
}

}  // namespace

// sizes: V, G, B, K, then strides: student crop, student image, teacher crop, teacher image, gradient crop, gradient image.
// half: bit 0 says that the student is bfloat16, bit 1 that the teacher is; else float32.
// workspace: as many floats as fastdino_dino_loss_workspace says; losses: B.

EXPORT(fastdino_dino_loss_forward)(
    float* loss, float* student_stats, float* teacher_stats, float* mean, float* workspace, double* losses,
    const void* student, const void* teacher, const float* center, const float* weights, float student_temp,
    float teacher_temp, const int64_t* n, int half, int threads
) {
    const Sizes s{n[0], n[1], n[2], n[3]};
    const auto run = [&](auto student_type, auto teacher_type) {
        using S = decltype(student_type);
        using T = decltype(teacher_type);
        forward<S, T>(
            loss, student_stats, teacher_stats, mean, workspace, losses, {static_cast<const S*>(student), n[4], n[5]},
            {static_cast<const T*>(teacher), n[6], n[7]}, center, weights, student_temp, teacher_temp, s, threads
        );
    };
    dispatch(half, run);
}

EXPORT(fastdino_dino_loss_backward)(
    void* gradient, float* workspace, const void* student, const void* teacher, const float* center,
    const float* weights, const float* student_stats, const float* teacher_stats, float student_temp,
    float teacher_temp, float upstream, const int64_t* n, int half, int threads
) {
    const Sizes s{n[0], n[1], n[2], n[3]};
    const auto run = [&](auto student_type, auto teacher_type) {
        using S = decltype(student_type);
        using T = decltype(teacher_type);
        const Logits<S> out{static_cast<S*>(gradient), n[8], n[9]};
        const Logits<const S> from{static_cast<const S*>(student), n[4], n[5]};
        const Logits<const T> taught{static_cast<const T*>(teacher), n[6], n[7]};
        (can_stream(out, student, s) ? backward<true, S, T> : backward<false, S, T>)(
            out, from, taught, center, weights, student_stats, teacher_stats, workspace, student_temp, teacher_temp,
            upstream, s, threads
        );
    };
    dispatch(half, run);
}

EXPORT(fastdino_dino_loss_workspace)(int64_t* floats, const int64_t* n, int threads) {
    const Sizes s{n[0], n[1], n[2], n[3]};
    *floats = Partial::size(s) + threads * Partial::scratch_size(s);
}
