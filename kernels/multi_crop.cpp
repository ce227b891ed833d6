// All crops of decoded images, bit for bit Pillow's: bicubic resize, flip, colour jitter, grayscale, blur, solarise.
//
// Every loop runs over contiguous bytes of one channel, so that the compiler makes vectors of it: the image is copied
// once, channel by channel and transposed, which turns the resize's horizontal pass into sums of whole columns, and each
// view's columns are transposed back for its vertical pass. Pillow computes in integers, in float and in double; so does
// this, in its order and without fused multiply-add (-ffp-contract=off).
#include <math.h>
#include <omp.h>
#include <string.h>

#include <vector>

#include "multi_crop_row.h"
#include "simd.h"

namespace {

typedef uint8_t u8;

constexpr int PRECISION = 22;  // bits after the point of a resize's weights
constexpr int64_t PAD = 64;    // bytes that a vector may read or write past a column's end

inline vi widen(const u8* p) {
#if defined(__AVX512F__)
    __m128i x;
    memcpy(&x, p, sizeof x);
    return (vi)_mm512_cvtepu8_epi32(x);
#elif defined(__AVX2__)
    int64_t x;
    memcpy(&x, p, sizeof x);
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x));
#else
    vi x;
    for (int i = 0; i < W; i++) x[i] = p[i];
    return x;
#endif
}

int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// Memory that stays between images, as large as the largest needed.
struct Scratch {
    std::vector<u8> image, columns, rows, plane;
    std::vector<int32_t> weights;
    std::vector<int64_t> first, count;

    static u8* of(std::vector<u8>& v, int64_t n) {
        if (static_cast<int64_t>(v.size()) < n) v.resize(n);
        return v.data();
    }
};

// A block of 16 by 16 bytes; every round interleaves the rows' halves, and four of them swap rows and columns.
inline void transpose_block(const u8* from, int64_t row, u8* to, int64_t stride) {
#if defined(__SSE2__)
    __m128i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row));
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
            y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        }
        for (int i = 0; i < 16; i++) x[i] = y[i];
    }
    for (int i = 0; i < 16; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), x[i]);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[i * stride + j] = from[j * row + i];
#endif
}

// (rows, columns) to (columns, rows).
void transpose(const u8* __restrict from, int64_t row, u8* __restrict to, int64_t stride, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
    for (int64_t y = 0; y < whole_rows; y += 16)
        for (int64_t x = 0; x < whole_columns; x += 16)
            transpose_block(from + y * row + x, row, to + x * stride + y, stride);
    for (int64_t y = 0; y < rows; y++)
        for (int64_t x = y < whole_rows ? whole_columns : 0; x < columns; x++) to[x * stride + y] = from[y * row + x];
}

// (height, width, channels) to three planes of (width, tall), of each column the first `height`.
void separate(const u8* image, int64_t height, int64_t width, int64_t channels, u8* out, int64_t tall, Scratch& s) {
    constexpr int64_t ROWS = 16;
    u8* part = Scratch::of(s.rows, 3 * ROWS * width);
    for (int64_t y = 0; y < height; y += ROWS) {
        const int64_t rows = height - y < ROWS ? height - y : ROWS;
        for (int64_t i = 0; i < rows; i++) {
            const u8* __restrict p = image + (y + i) * width * channels;
            u8 *__restrict r = part + i * width, *__restrict g = r + ROWS * width, *__restrict b = g + ROWS * width;
            if (channels == 3)
                for (int64_t x = 0; x < width; x++) r[x] = p[3 * x], g[x] = p[3 * x + 1], b[x] = p[3 * x + 2];
            else
                for (int64_t x = 0; x < width; x++) r[x] = p[4 * x], g[x] = p[4 * x + 1], b[x] = p[4 * x + 2];
        }
        for (int c = 0; c < 3; c++)
            transpose(part + c * ROWS * width, width, out + c * width * tall + y, tall, rows, width);
    }
}

double bicubic(double x) {
    constexpr double a = -0.5;
    if (x < 0) x = -x;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Weights of `size` outputs from n inputs; of output i count[i] inputs from first[i] on. Returns the weights' stride.
int64_t weigh(int64_t n, int64_t size, Scratch& s) {
    const double scale = static_cast<double>(n) / size, widen = scale < 1 ? 1 : scale, support = 2 * widen;
    const int64_t stride = static_cast<int64_t>(ceil(support)) * 2 + 1;
    s.weights.resize(size * stride);
    s.first.resize(size);
    s.count.resize(size);
    std::vector<double> w(stride);
    for (int64_t i = 0; i < size; i++) {
        const double center = (i + 0.5) * scale, shrink = 1 / widen;
        int64_t from = static_cast<int>(center - support + 0.5), to = static_cast<int>(center + support + 0.5);
        if (from < 0) from = 0;
        if (to > n) to = n;
        double total = 0;
        for (int64_t k = 0; k < to - from; k++) total += w[k] = bicubic((k + from - center + 0.5) * shrink);
        for (int64_t k = 0; k < to - from; k++) {
            const double x = (total != 0 ? w[k] / total : w[k]) * (1 << PRECISION);
            s.weights[i * stride + k] = static_cast<int>(x < 0 ? x - 0.5 : x + 0.5);
        }
        s.first[i] = from;
        s.count[i] = to - from;
    }
    return stride;
}

// out[j] = sum over k of weights[k] in[k * stride + j], rounded; writes up to PAD - 1 bytes past n.
void combine(const u8* __restrict in, int64_t stride, const int32_t* __restrict weights, int64_t count, u8* __restrict out,
             int64_t n) {
    constexpr int N = PAD / W;
    for (int64_t j = 0; j < n; j += PAD) {
        vi sum[N];
        for (int l = 0; l < N; l++) sum[l] = vi{} + (1 << (PRECISION - 1));
        for (int64_t k = 0; k < count; k++) {
            const u8* p = in + k * stride + j;
            for (int l = 0; l < N; l++) sum[l] += widen(p + l * W) * weights[k];
        }
        int32_t x[PAD];
        memcpy(x, sum, sizeof x);
        for (int l = 0; l < PAD; l++) {
            const int32_t y = x[l] >> PRECISION;
            out[j + l] = y < 0 ? 0 : y > 255 ? 255 : y;
        }
    }
}

void resize(const u8* image, int64_t height, int64_t width, const double* p, u8* out, int64_t size, Scratch& s) {
    const int64_t top = p[BOX], left = p[BOX + 1], h = p[BOX + 2], w = p[BOX + 3];
    const int64_t tall = padded(height), high = padded(h), wide = padded(size);
    u8* columns = Scratch::of(s.columns, 3 * size * high + PAD);
    u8* rows = Scratch::of(s.rows, h * wide + PAD);
    int64_t stride = weigh(w, size, s);
    for (int c = 0; c < 3; c++)
        for (int64_t i = 0; i < size; i++)
            combine(image + (c * width + left + s.first[i]) * tall + top, tall, &s.weights[i * stride], s.count[i],
                    columns + (c * size + (p[FLIP] ? size - 1 - i : i)) * high, h);
    stride = weigh(h, size, s);
    u8 row[PAD];
    for (int c = 0; c < 3; c++) {
        transpose(columns + c * size * high, high, rows, wide, size, h);
        for (int64_t i = 0; i < size; i++) {
            const u8* from = rows + s.first[i] * wide;
            const int32_t* weights = &s.weights[i * stride];
            u8* to = out + (c * size + i) * size;
            const int64_t whole = size / PAD * PAD;  // what follows the last whole vector is another row's or view's
            combine(from, wide, weights, s.count[i], to, whole);
            if (whole == size) continue;
            combine(from + whole, wide, weights, s.count[i], row, 1);
            memcpy(to + whole, row, size - whole);
        }
    }
}

// Pillow's luma of 8-bit RGB
inline int32_t luma(int32_t r, int32_t g, int32_t b) { return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16; }

// Pillow's blend of an image with its degenerate, in float
inline u8 blend(int32_t degenerate, int32_t x, float factor) {
    const float y = static_cast<float>(degenerate) + factor * static_cast<float>(x - degenerate);
    return static_cast<u8>(static_cast<int32_t>(y < 0 ? 0 : y > 255 ? 255 : y));
}

void brighten(u8* __restrict x, int64_t n, float factor) {
    for (int64_t i = 0; i < 3 * n; i++) x[i] = blend(0, x[i], factor);
}

void contrast(u8* __restrict x, int64_t n, float factor) {
    int64_t sum = 0;
    for (int64_t from = 0; from < n; from += 1 << 20) {  // a part's sum fits 32 bits
        const int64_t to = from + (1 << 20) < n ? from + (1 << 20) : n;
        int32_t part = 0;
        for (int64_t i = from; i < to; i++) part += luma(x[i], x[n + i], x[2 * n + i]);
        sum += part;
    }
    const int32_t mean = static_cast<int32_t>(static_cast<double>(sum) / static_cast<double>(n) + 0.5);
    for (int64_t i = 0; i < 3 * n; i++) x[i] = blend(mean, x[i], factor);
}

void saturate(u8* __restrict r, u8* __restrict g, u8* __restrict b, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) {
        const int32_t gray = luma(r[i], g[i], b[i]);
        r[i] = blend(gray, r[i], factor);
        g[i] = blend(gray, g[i], factor);
        b[i] = blend(gray, b[i], factor);
    }
}

void gray(u8* __restrict r, u8* __restrict g, u8* __restrict b, int64_t n) {
    for (int64_t i = 0; i < n; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

// half away from zero, of x >= 0
inline int32_t nearest(double x) {
    const int32_t whole = static_cast<int32_t>(x);
    return whole + (x - whole >= 0.5 ? 1 : 0);
}

// To HSV in 8 bits, the hue turned by `shift` of 256 steps, and back. In blocks whose stages lie in arrays: as one loop
// over pixels the compiler makes no vectors of it.
void turn(u8* __restrict red, u8* __restrict green, u8* __restrict blue, int64_t n, int32_t shift) {
    constexpr int B = 128;
    int32_t v[B], gray[B], hue[B], saturation[B];
    float range[B], rc[B], gc[B], bc[B], sector[B], f[B], fs[B];
    u8 p[B], q[B], t[B], k[B];
    for (int64_t from = 0; from < n; from += B) {
        const int m = n - from < B ? n - from : B;
        u8 r[B] = {}, g[B] = {}, b[B] = {};
        memcpy(r, red + from, m);
        memcpy(g, green + from, m);
        memcpy(b, blue + from, m);
        for (int i = 0; i < B; i++) {
            const int32_t x = r[i], y = g[i], z = b[i];
            const int32_t xy = x > y ? x : y, low = x < y ? x : y;
            v[i] = xy > z ? xy : z;
            const int32_t least = low < z ? low : z;
            gray[i] = v[i] == least;
            range[i] = static_cast<float>(v[i] - least);
        }
        for (int i = 0; i < B; i++) {
            const float by = range[i] + static_cast<float>(gray[i]);
            rc[i] = static_cast<float>(v[i] - r[i]) / by;
            gc[i] = static_cast<float>(v[i] - g[i]) / by;
            bc[i] = static_cast<float>(v[i] - b[i]) / by;
        }
        for (int i = 0; i < B; i++) {
            const float at_red = bc[i] - gc[i], at_green = static_cast<float>(2.0 + rc[i] - bc[i]),
                        at_blue = static_cast<float>(4.0 + gc[i] - rc[i]);
            const float other = g[i] == v[i] ? at_green : at_blue;
            sector[i] = r[i] == v[i] ? at_red : other;
        }
        for (int i = 0; i < B; i++) {
            const double turned = sector[i] / 6.0 + 1.0;
            const float h = static_cast<float>(turned - static_cast<int32_t>(turned));
            const int32_t step = static_cast<int32_t>(h * 255.0);
            hue[i] = (step * (1 - gray[i]) + shift) & 255;
        }
        for (int i = 0; i < B; i++)
            saturation[i] =
                static_cast<int32_t>(range[i] / static_cast<float>(v[i] + (v[i] == 0)) * 255.0);
        for (int i = 0; i < B; i++) {
            const double sixths = static_cast<float>(hue[i]) * 6.0 / 255.0;
            const int32_t whole = static_cast<int32_t>(sixths);
            k[i] = whole;
            f[i] = static_cast<float>(sixths - static_cast<float>(whole));
            fs[i] = static_cast<float>(saturation[i] / 255.0);
        }
        for (int i = 0; i < B; i++) p[i] = nearest(v[i] * (1.0 - fs[i]));
        for (int i = 0; i < B; i++) q[i] = nearest(v[i] * (1.0 - fs[i] * f[i]));
        for (int i = 0; i < B; i++) t[i] = nearest(v[i] * (1.0 - fs[i] * (1.0 - f[i])));
        // 6 is the red end of the circle again; a gray has s = 0 and so p = q = t = v
        for (int i = 0; i < B; i++) {
            const u8 x = v[i];
            r[i] = k[i] == 1 ? q[i] : (k[i] == 2) | (k[i] == 3) ? p[i] : k[i] == 4 ? t[i] : x;
            g[i] = (k[i] == 0) | (k[i] == 6) ? t[i] : (k[i] == 1) | (k[i] == 2) ? x : k[i] == 3 ? q[i] : p[i];
            b[i] = k[i] == 2 ? t[i] : (k[i] == 3) | (k[i] == 4) ? x : k[i] == 5 ? q[i] : p[i];
        }
        memcpy(red + from, r, m);
        memcpy(green + from, g, m);
        memcpy(blue + from, b, m);
    }
}

struct Box {
    int64_t radius;
    uint32_t inner, outer;  // weights of the 2 radius + 1 in the middle and of the two beyond, in 2^24ths

    // three passes have about the standard deviation `sigma`
    explicit Box(float sigma) {
        const float variance = sigma * sigma / 3;
        const float length = static_cast<float>(sqrt(12.0 * variance + 1.0));
        const float whole = static_cast<float>(floor((length - 1.0) / 2.0));
        float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
        part /= 6 * (variance - (whole + 1) * (whole + 1));
        const float size = whole + part;
        radius = static_cast<int64_t>(size);
        inner = static_cast<uint32_t>(static_cast<float>(1 << 24) / (size * 2 + 1));
        outer = ((1u << 24) - static_cast<uint32_t>(radius * 2 + 1) * inner) / 2;
    }
};

// out[i] from line(offset)[i], offsets from -radius - 1 to radius + 1
template <class Line>
inline void box(Line line, const Box& b, u8* __restrict out, int64_t n) {
    const u8 *before = line(-b.radius - 1), *after = line(b.radius + 1), *here = line(0);
    if (b.radius == 0) {
        for (int64_t i = 0; i < n; i++)
            out[i] = (here[i] * b.inner + (before[i] + uint32_t(after[i])) * b.outer + (1u << 23)) >> 24;
    } else if (b.radius == 1) {
        const u8 *left = line(-1), *right = line(1);
        for (int64_t i = 0; i < n; i++)
            out[i] = ((left[i] + uint32_t(here[i]) + right[i]) * b.inner +
                      (before[i] + uint32_t(after[i])) * b.outer + (1u << 23)) >> 24;
    } else {
        for (int64_t from = 0; from < n; from += PAD) {
            const int64_t m = n - from < PAD ? n - from : PAD;
            uint32_t sum[PAD] = {};
            for (int64_t k = -b.radius; k <= b.radius; k++) {
                const u8* p = line(k) + from;
                for (int64_t i = 0; i < m; i++) sum[i] += p[i];
            }
            for (int64_t i = 0; i < m; i++)
                out[from + i] =
                    (sum[i] * b.inner + (before[from + i] + uint32_t(after[from + i])) * b.outer + (1u << 23)) >> 24;
        }
    }
}

// One pass down the columns of a plane; what lies beyond an edge is the edge.
void blur_down(const u8* from, u8* to, int64_t size, const Box& b) {
    const int64_t margin = b.radius + 1, inner = size - 2 * margin;
    const auto row = [=](int64_t y) { return from + (y < 0 ? 0 : y >= size ? size - 1 : y) * size; };
    for (int64_t y = 0; y < size; y++) {
        if (y == margin && inner > 0) y += inner;
        if (y < size) box([=](int64_t k) { return row(y + k); }, b, to + y * size, size);
    }
    if (inner > 0) box([=](int64_t k) { return from + (margin + k) * size; }, b, to + margin * size, inner * size);
}

void blur(u8* plane, int64_t size, const Box& b, Scratch& s) {
    u8 *one = Scratch::of(s.plane, 2 * size * size), *two = one + size * size;
    transpose(plane, size, one, size, size, size);
    blur_down(one, two, size, b);
    blur_down(two, one, size, b);
    blur_down(one, two, size, b);
    transpose(two, size, plane, size, size, size);
    blur_down(plane, one, size, b);
    blur_down(one, two, size, b);
    blur_down(two, plane, size, b);
}

void make(const u8* image, int64_t height, int64_t width, const double* p, u8* out, int64_t size, Scratch& s) {
    resize(image, height, width, p, out, size, s);
    const int64_t n = size * size;
    u8 *r = out, *g = out + n, *b = out + 2 * n;
    for (const double* j = p + JITTER; j < p + JITTER_END; j += 2) {
        const float factor = static_cast<float>(j[1]);
        switch (static_cast<int>(j[0])) {
            case BRIGHTNESS: brighten(out, n, factor); break;
            case CONTRAST: contrast(out, n, factor); break;
            case SATURATION: saturate(r, g, b, n, factor); break;
            case HUE: turn(r, g, b, n, static_cast<int32_t>(j[1] * 255)); break;
        }
    }
    if (p[GRAYSCALE]) gray(r, g, b, n);
    if (p[BLUR] > 0)
        for (int c = 0; c < 3; c++) blur(out + c * n, size, Box(static_cast<float>(p[BLUR])), s);
    if (p[SOLARIZE])
        for (int64_t i = 0; i < 3 * n; i++) out[i] = out[i] < 128 ? out[i] : 255 - out[i];
}

}  // namespace

// images[b]: (shapes[b][0], shapes[b][1], shapes[b][2]) bytes, of which the first three of the last are red, green, blue.
// parameters: (count, views, FIELDS). out[v]: (count, 3, sizes[v], sizes[v]).
EXPORT(fastdino_multi_crop)(
    const u8* const* images, const int64_t* shapes, int64_t count, const double* parameters, int64_t views, u8* const* out,
    const int64_t* sizes, int threads
) {
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch s;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const int64_t height = shapes[3 * i], width = shapes[3 * i + 1], channels = shapes[3 * i + 2];
            const int64_t tall = padded(height);
            u8* columns = Scratch::of(s.image, 3 * width * tall + PAD);
            separate(images[i], height, width, channels, columns, tall, s);
            for (int64_t v = 0; v < views; v++)
                make(columns, height, width, parameters + (i * views + v) * FIELDS,
                     out[v] + i * 3 * sizes[v] * sizes[v], sizes[v], s);
        }
    }
}
