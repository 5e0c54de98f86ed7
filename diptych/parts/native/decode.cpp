// One token of a causal transformer in several contexts: every matrix is read from memory once for all of them.
//
// Plain C++ without a framework's headers: it compiles in seconds, and is called with pointers into tensors that stay
// where they are. One parallel region spans all layers; rows of matrices and heads are shared out among the threads, and
// what one row of the batch becomes does not depend on how many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define WIDE 1
#include <immintrin.h>
#endif

typedef uint16_t bf16;
enum Kind { F32 = 0, BF16 = 1, INT8 = 2 };
enum Norm { RMS = 0, LAYER = 1 };
enum Mlp { SWIGLU = 0, GELU_TANH = 1, GELU_ERF = 2, NONE = 3 };

extern "C" {

struct Matrix {  // (rows, columns), row after row; of INT8 also the scale and the sum of every row
    const void* weight;
    const float* scale;
    const int32_t* sums;
    const float* bias;
    int64_t kind, rows, columns;
};

struct Layer {
    Matrix qkv, out, up, down;  // up: gate and up one below the other where the network is gated
    const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias;
    const float *q_norm, *q_norm_bias, *k_norm, *k_norm_bias;  // or null
};

struct Shape {
    int64_t width, heads, kv_heads, head_dim, hidden, layers, norm, mlp, parallel, cache;  // cache: F32 or BF16
    float eps, qk_eps;
};
}

namespace {

const int MOST = 6;  // rows of the batch that share one pass over a weight: their sums fit the registers

inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

inline float widened(float x) { return x; }
inline float widened(bf16 x) { return wide(x); }
inline float widened(int8_t x) { return x; }

inline bf16 narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 64);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Span {
    int64_t from, to;
};

inline Span share(int64_t count, int64_t grain) {  // of this thread, in multiples of `grain`
#ifdef _OPENMP
    int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
#else
    int64_t threads = 1, own = 0;
#endif
    int64_t blocks = (count + grain - 1) / grain;
    return {std::min(count, blocks * own / threads * grain), std::min(count, blocks * (own + 1) / threads * grain)};
}

// -- products: R rows of a matrix with M rows of the batch --------------------------------------------------------------

struct Rows {  // the batch as a product wants it: (batch, columns) in float32, bfloat16, or two bytes with a scale per row
    const float* f;
    const bf16* h;
    const uint8_t *high, *low;
    const float* scale;
    int64_t columns;
};

#ifdef WIDE
// the sums of four vectors
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    auto half = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    auto half = [](__m512i v) { return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)); };
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(half(a), half(b)), _mm256_hadd_epi32(half(c), half(d)));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// int8 with an input of 16 bits in two products of bytes: exact in integers. Inputs are shifted to be unsigned, which the
// sum of the weights takes back.
template <int R, int M>
inline void dots8(const Matrix& w, int64_t row, const Rows& x, int64_t first, float out[M][R]) {
    const int64_t n = x.columns;
    const int8_t* at = (const int8_t*)w.weight + row * n;
    const uint8_t *high = x.high + first * n, *low = x.low + first * n;
    __m512i top[R][M], bottom[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) top[r][m] = bottom[r][m] = _mm512_setzero_si512();
    auto some = [&](int64_t k, __mmask64 here) {
        __m512i v[R];
        for (int r = 0; r < R; r++) v[r] = _mm512_maskz_loadu_epi8(here, at + r * n + k);
        for (int m = 0; m < M; m++) {
            const __m512i a = _mm512_maskz_loadu_epi8(here, high + m * n + k);
            const __m512i b = _mm512_maskz_loadu_epi8(here, low + m * n + k);
            for (int r = 0; r < R; r++) {
                top[r][m] = _mm512_dpbusd_epi32(top[r][m], a, v[r]);
                bottom[r][m] = _mm512_dpbusd_epi32(bottom[r][m], b, v[r]);
            }
        }
    };
    int64_t k = 0;
    for (; k + 64 <= n; k += 64) {
        if (first == 0)
            for (int r = 0; r < R; r++) _mm_prefetch((const char*)(at + (r + R) * n + k), _MM_HINT_T0);
        some(k, ~0ull);
    }
    if (k < n) some(k, (1ull << (n - k)) - 1);
    for (int m = 0; m < M; m++) {
        int32_t upper[4], lower[4];
        if (R == 4) {
            _mm_storeu_si128((__m128i*)upper, sums_of(top[0][m], top[1 % R][m], top[2 % R][m], top[3 % R][m]));
            _mm_storeu_si128((__m128i*)lower, sums_of(bottom[0][m], bottom[1 % R][m], bottom[2 % R][m], bottom[3 % R][m]));
        } else {
            upper[0] = _mm512_reduce_add_epi32(top[0][m]), lower[0] = _mm512_reduce_add_epi32(bottom[0][m]);
        }
        for (int r = 0; r < R; r++) {
            const int64_t sum = 256 * int64_t(upper[r]) + lower[r] - 32768 * int64_t(w.sums[row + r]);
            out[m][r] = float(sum) * w.scale[row + r] * x.scale[first + m];
        }
    }
}

template <int R, int M>  // R is 4 or 1
inline void dots(const Matrix& w, int64_t row, const Rows& x, int64_t first, float out[M][R]) {
    const int64_t n = x.columns;
    if (w.kind == INT8) {  // twice as many sums
        const int half = M > 1 ? M / 2 : 1, rest = M - half;
        dots8<R, half>(w, row, x, first, out);
        if (rest > 0) dots8<R, (rest > 0 ? rest : 1)>(w, row, x, first + half, out + half);
        return;
    }
    __m512 sum[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    if (w.kind == BF16) {
        const bf16 *at = (const bf16*)w.weight + row * n, *a = x.h + first * n;
        auto some = [&](int64_t k, __mmask32 here) {
            __m512bh v[R];
            for (int r = 0; r < R; r++) v[r] = (__m512bh)_mm512_maskz_loadu_epi16(here, at + r * n + k);
            for (int m = 0; m < M; m++) {
                const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(here, a + m * n + k);
                for (int r = 0; r < R; r++) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], v[r], b);
            }
        };
        int64_t k = 0;
        for (; k + 32 <= n; k += 32) {
            if (first == 0)  // rows are short: the next ones are asked for
                for (int r = 0; r < R; r++) _mm_prefetch((const char*)(at + (r + R) * n + k), _MM_HINT_T0);
            some(k, ~0u);
        }
        if (k < n) some(k, (1u << (n - k)) - 1);
    } else {
        const float *at = (const float*)w.weight + row * n, *a = x.f + first * n;
        for (int64_t k = 0; k < n; k += 16) {
            const __mmask16 here = __mmask16(k + 16 <= n ? 0xffff : (1u << (n - k)) - 1);
            __m512 v[R];
            for (int r = 0; r < R; r++) {
                v[r] = _mm512_maskz_loadu_ps(here, at + r * n + k);
                _mm_prefetch((const char*)(at + (r + R) * n + k), _MM_HINT_T0);
            }
            for (int m = 0; m < M; m++) {
                const __m512 b = _mm512_maskz_loadu_ps(here, a + m * n + k);
                for (int r = 0; r < R; r++) sum[r][m] = _mm512_fmadd_ps(v[r], b, sum[r][m]);
            }
        }
    }
    for (int m = 0; m < M; m++)
        if (R == 4) _mm_storeu_ps(out[m], sums_of(sum[0][m], sum[1 % R][m], sum[2 % R][m], sum[3 % R][m]));
        else out[m][0] = _mm512_reduce_add_ps(sum[0][m]);
}
#else
template <typename T>
inline float dot_of(const T* w, const float* a, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += widened(w[k]) * a[k];
    return sum;
}

template <int R, int M>  // R is 4 or 1
inline void dots(const Matrix& w, int64_t row, const Rows& x, int64_t first, float out[M][R]) {
    const int64_t n = x.columns;
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            const float* a = x.f + (first + m) * n;
            const int64_t at = (row + r) * n;
            out[m][r] = w.kind == F32 ? dot_of((const float*)w.weight + at, a, n)
                : w.kind == BF16      ? dot_of((const bf16*)w.weight + at, a, n)
                                      : dot_of((const int8_t*)w.weight + at, a, n) * w.scale[row + r];
        }
}
#endif

template <int R, int M>
inline void block(const Matrix& w, int64_t row, const Rows& x, int64_t first, float* y, int64_t stride, bool add) {
    float out[M][R];
    dots<R, M>(w, row, x, first, out);
    for (int m = 0; m < M; m++) {
        float* at = y + (first + m) * stride + row;
        for (int r = 0; r < R; r++) {
            const float value = w.bias ? out[m][r] + w.bias[row + r] : out[m][r];
            at[r] = add ? at[r] + value : value;
        }
    }
}

template <int R>
inline void rows_of(const Matrix& w, int64_t row, const Rows& x, int64_t first, int64_t count, float* y, int64_t stride,
                    bool add) {
    switch (count) {
        case 1: return block<R, 1>(w, row, x, first, y, stride, add);
        case 2: return block<R, 2>(w, row, x, first, y, stride, add);
        case 3: return block<R, 3>(w, row, x, first, y, stride, add);
        case 4: return block<R, 4>(w, row, x, first, y, stride, add);
        case 5: return block<R, 5>(w, row, x, first, y, stride, add);
        case 6: return block<R, 6>(w, row, x, first, y, stride, add);
    }
}

// y (batch, stride) [+]= x (batch, columns) W^T + bias for rows `from` to `to` of W. As many rows at a time as a cache
// holds: the first few of the batch bring them there, and these stay in a nearer one meanwhile.
void product(const Matrix& w, Span rows, const Rows& x, int64_t batch, float* y, int64_t stride, bool add) {
    const int64_t held = std::max<int64_t>(4, (1 << 17) / x.columns / 4 * 4);
    for (int64_t from = rows.from; from < rows.to; from += held) {
        const int64_t to = std::min(rows.to, from + held);
        for (int64_t b = 0; b < batch; b += MOST) {
            const int64_t count = std::min<int64_t>(MOST, batch - b);
            int64_t row = from;
            for (; row + 4 <= to; row += 4) rows_of<4>(w, row, x, b, count, y, stride, add);
            for (; row < to; row++) rows_of<1>(w, row, x, b, count, y, stride, add);
        }
    }
}

// -- elementwise --------------------------------------------------------------------------------------------------------

void normalise(int64_t norm, float eps, const float* weight, const float* bias, const float* x, float* y, int64_t n) {
    float mean = 0, square = 0;
    if (norm == LAYER) {
#pragma omp simd reduction(+ : mean)
        for (int64_t k = 0; k < n; k++) mean += x[k];
        mean /= float(n);
    }
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < n; k++) square += (x[k] - mean) * (x[k] - mean);
    const float scale = 1 / std::sqrt(square / float(n) + eps);
    for (int64_t k = 0; k < n; k++) y[k] = (x[k] - mean) * scale * weight[k] + (bias ? bias[k] : 0);
}

void rounded(const float* x, bf16* y, int64_t n) {
    for (int64_t k = 0; k < n; k++) y[k] = narrow(x[k]);
}

inline float gelu(int64_t kind, float x) {
    if (kind == GELU_ERF) return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f));
    return 0.5f * x * (1 + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// pairs are (i, i + turned / 2); channels behind those that have angles pass
void turn(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

#ifdef WIDE
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// q . k of four keys, V vectors of 16 channels each
template <int V, typename T>
inline __m128 four(const __m512 q[V], const T* keys) {
    __m512 sums[4];
    for (int j = 0; j < 4; j++) {
        sums[j] = _mm512_mul_ps(q[0], load(keys + j * 16 * V));
        for (int i = 1; i < V; i++) sums[j] = _mm512_fmadd_ps(q[i], load(keys + j * 16 * V + 16 * i), sums[j]);
    }
    return sums_of(sums[0], sums[1], sums[2], sums[3]);
}

template <int V, typename T>
void score(const float* q, const T* keys, int64_t count, float* scores) {
    __m512 of[V];
    for (int i = 0; i < V; i++) of[i] = load(q + 16 * i);
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) _mm_storeu_ps(scores + k, four<V>(of, keys + k * 16 * V));
    for (; k < count; k++) {
        __m512 sum = _mm512_mul_ps(of[0], load(keys + k * 16 * V));
        for (int i = 1; i < V; i++) sum = _mm512_fmadd_ps(of[i], load(keys + k * 16 * V + 16 * i), sum);
        scores[k] = _mm512_reduce_add_ps(sum);
    }
}

template <int V, typename T>
void blend(const float* scores, const T* values, int64_t count, float* out) {
    __m512 sum[V];
    for (int i = 0; i < V; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k++) {
        const __m512 weight = _mm512_set1_ps(scores[k]);
        for (int i = 0; i < V; i++) sum[i] = _mm512_fmadd_ps(weight, load(values + k * 16 * V + 16 * i), sum[i]);
    }
    for (int i = 0; i < V; i++) _mm512_storeu_ps(out + 16 * i, sum[i]);
}
#endif

template <typename T>
void score_any(const float* q, const T* keys, int64_t count, int64_t n, float* scores) {
    for (int64_t k = 0; k < count; k++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += q[i] * widened(keys[k * n + i]);
        scores[k] = sum;
    }
}

template <typename T>
void blend_any(const float* scores, const T* values, int64_t count, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = 0;
    for (int64_t k = 0; k < count; k++)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] += scores[k] * widened(values[k * n + i]);
}

// one query head over `count` keys of n channels
template <typename T>
void attend(float* q, const T* keys, const T* values, int64_t count, int64_t n, float* scores, float* out) {
    const float scale = 1 / std::sqrt(float(n));
    for (int64_t i = 0; i < n; i++) q[i] *= scale;
#ifdef WIDE
    switch (n) {
        case 32: score<2>(q, keys, count, scores); break;
        case 64: score<4>(q, keys, count, scores); break;
        case 96: score<6>(q, keys, count, scores); break;
        case 128: score<8>(q, keys, count, scores); break;
        default: score_any(q, keys, count, n, scores);
    }
#else
    score_any(q, keys, count, n, scores);
#endif
    float most = scores[0], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < count; k++) most = std::max(most, scores[k]);
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < count; k++) {
        scores[k] = std::exp(scores[k] - most);
        total += scores[k];
    }
    for (int64_t k = 0; k < count; k++) scores[k] /= total;
#ifdef WIDE
    switch (n) {
        case 32: return blend<2>(scores, values, count, out);
        case 64: return blend<4>(scores, values, count, out);
        case 96: return blend<6>(scores, values, count, out);
        case 128: return blend<8>(scores, values, count, out);
    }
#endif
    blend_any(scores, values, count, n, out);
}

inline void keep(const float* x, float* y, int64_t n) { memcpy(y, x, size_t(n) * 4); }
inline void keep(const float* x, bf16* y, int64_t n) { rounded(x, y, n); }

struct Job {
    const Shape& s;
    int64_t batch, half;
    const float *cosine, *sine;
    void *const *keys, *const *values;  // (layers, batch): the heads of one row's context, (kv_heads, capacity, head_dim)
    const int64_t *lengths, *capacities;
    float *qkv, *mixed, *up, *scores;
    int64_t longest;

    template <typename T>
    void attention(const Layer& layer, int64_t number) const {
        const int64_t d = s.head_dim, groups = s.heads / s.kv_heads, total = s.heads + 2 * s.kv_heads;
        const Span own = share(batch * s.kv_heads, 1);
#ifdef _OPENMP
        float* memory = scores + omp_get_thread_num() * longest;
#else
        float* memory = scores;
#endif
        for (int64_t item = own.from; item < own.to; item++) {
            const int64_t b = item / s.kv_heads, g = item % s.kv_heads;
            float* at = qkv + b * total * d;
            float *k = at + (s.heads + g) * d, *v = at + (s.heads + s.kv_heads + g) * d;
            const float *c = cosine + b * half, *n = sine + b * half;
            if (layer.k_norm) normalise(s.norm, s.qk_eps, layer.k_norm, layer.k_norm_bias, k, k, d);
            turn(k, c, n, half);
            T* past = (T*)keys[number * batch + b] + g * capacities[b] * d;
            T* seen = (T*)values[number * batch + b] + g * capacities[b] * d;
            keep(k, past + lengths[b] * d, d);
            keep(v, seen + lengths[b] * d, d);
            for (int64_t h = g * groups; h < (g + 1) * groups; h++) {
                float* q = at + h * d;
                if (layer.q_norm) normalise(s.norm, s.qk_eps, layer.q_norm, layer.q_norm_bias, q, q, d);
                turn(q, c, n, half);
                attend(q, past, seen, lengths[b] + 1, d, memory, mixed + b * s.heads * d + h * d);
            }
        }
    }
};

// the inputs x (batch, columns) as the product with w wants them; `memory`: as many floats
Rows given(const Matrix& w, const float* x, int64_t batch, float* memory) {
    Rows out{x, nullptr, nullptr, nullptr, nullptr, w.columns};
#ifdef WIDE
    const int64_t n = w.columns;
    if (w.kind == BF16) {
        rounded(x, (bf16*)memory, batch * n);
        out.h = (bf16*)memory;
    } else if (w.kind == INT8) {
        float* scale = memory;
        uint8_t *high = (uint8_t*)(memory + batch), *low = high + batch * n;
        for (int64_t b = 0; b < batch; b++) {
            const float* from = x + b * n;
            float most = 1e-30f;
#pragma omp simd reduction(max : most)
            for (int64_t k = 0; k < n; k++) most = std::max(most, std::fabs(from[k]));
            scale[b] = most / 32767;
            const float up = 32767 / most;
            for (int64_t k = 0; k < n; k++) {
                const uint32_t value = uint32_t(int32_t(std::nearbyint(from[k] * up)) + 32768);
                high[b * n + k] = uint8_t(value >> 8);
                low[b * n + k] = uint8_t(value & 255);
            }
        }
        out.scale = scale, out.high = high, out.low = low;
    }
#else
    (void)batch, (void)memory;
#endif
    return out;
}

}  // namespace

extern "C" {

// floats of scratch memory that `decode_step` needs
int64_t decode_scratch(const Shape* shape, int64_t batch, int64_t longest, int64_t threads) {
    const Shape& s = *shape;
    const int64_t heads = (s.heads + 2 * s.kv_heads) * s.head_dim, wide = std::max(std::max(s.width, s.hidden), heads);
    const int64_t up = s.mlp == SWIGLU ? 2 * s.hidden : s.hidden;
    return batch * (heads + s.heads * s.head_dim + up) + threads * (longest + 2 * batch * wide);
}

// x (batch, width): the states of the new tokens; afterwards those behind the last layer, after `final` norm. Keys and
// values of the new tokens are written at `lengths`. cosine, sine (batch, half).
void decode_step(const Shape* shape, const Layer* layers, const float* final, const float* final_bias, int64_t batch,
                 float* x, const float* cosine, const float* sine, int64_t half, void* const* keys,
                 void* const* values, const int64_t* lengths, const int64_t* capacities, float* scratch,
                 int64_t threads) {
    const Shape& s = *shape;
    const int64_t d = s.head_dim, heads = (s.heads + 2 * s.kv_heads) * d, mixed = s.heads * d;
    const int64_t up = s.mlp == SWIGLU ? 2 * s.hidden : s.hidden;
    const int64_t wide = std::max(std::max(s.width, s.hidden), heads);
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; b++) longest = std::max(longest, lengths[b] + 1);
    Job job{s, batch, half, cosine, sine, keys, values, lengths, capacities, scratch,
            scratch + batch * heads, scratch + batch * (heads + mixed), scratch + batch * (heads + mixed + up), longest};
    float* own = job.scores + threads * longest;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
#endif
    {
#ifdef _OPENMP
        const int64_t me = omp_get_thread_num();
#else
        const int64_t me = 0;
#endif
        // every thread prepares the inputs of products for itself: they are small, and in its own cache
        float *f = own + me * 2 * batch * wide, *memory = f + batch * wide;
        auto normed = [&](const float* weight, const float* bias, const Matrix& w) {
            for (int64_t b = 0; b < batch; b++) normalise(s.norm, s.eps, weight, bias, x + b * s.width, f + b * s.width,
                                                          s.width);
            return given(w, f, batch, memory);
        };
        for (int64_t n = 0; n < s.layers; n++) {
            const Layer& layer = layers[n];
            product(layer.qkv, share(heads, 4), normed(layer.norm, layer.norm_bias, layer.qkv), batch, job.qkv, heads,
                    false);
#pragma omp barrier
            if (s.cache == BF16) job.attention<bf16>(layer, n);
            else job.attention<float>(layer, n);
            if (s.parallel) {  // reads the state before attention is added
                product(layer.up, share(up, 4), normed(layer.norm, layer.norm_bias, layer.up), batch, job.up, up, false);
            }
#pragma omp barrier
            product(layer.out, share(s.width, 4), given(layer.out, job.mixed, batch, memory), batch, x, s.width, true);
            if (!s.parallel) {
#pragma omp barrier
                const Rows in = normed(layer.mlp_norm, layer.mlp_norm_bias, layer.up);
                if (s.mlp == SWIGLU) {  // a thread has the gates of what it lifts
                    const Span part = share(s.hidden, 4);
                    product(layer.up, part, in, batch, job.up, up, false);
                    product(layer.up, {part.from + s.hidden, part.to + s.hidden}, in, batch, job.up, up, false);
                    for (int64_t b = 0; b < batch; b++) {
                        float *gate = job.up + b * up, *lifted = gate + s.hidden;
                        for (int64_t k = part.from; k < part.to; k++) gate[k] = gate[k] / (1 + std::exp(-gate[k])) * lifted[k];
                    }
                } else {
                    product(layer.up, share(up, 4), in, batch, job.up, up, false);
                }
            }
#pragma omp barrier
            if (s.mlp == SWIGLU && !s.parallel) {
                for (int64_t b = 0; b < batch; b++) memcpy(f + b * s.hidden, job.up + b * up, size_t(s.hidden) * 4);
            } else {
                for (int64_t b = 0; b < batch; b++)
                    for (int64_t k = 0; k < s.hidden; k++) {
                        const float* at = job.up + b * up;
                        f[b * s.hidden + k] = s.mlp == SWIGLU ? at[k] / (1 + std::exp(-at[k])) * at[k + s.hidden]
                                                              : gelu(s.mlp, at[k]);
                    }
            }
            product(layer.down, share(s.width, 4), given(layer.down, f, batch, memory), batch, x, s.width, true);
#pragma omp barrier
        }
        const Span rows = share(batch, 1);
        for (int64_t b = rows.from; b < rows.to; b++)
            normalise(s.norm, s.eps, final, final_bias, x + b * s.width, x + b * s.width, s.width);
    }
}

// y (batch, rows) = f(x (batch, columns) W^T + bias), f as `then` says; scratch: batch * columns floats per thread
void decode_product(const Matrix* matrix, int64_t batch, const float* x, float* y, int64_t then, float* scratch,
                    int64_t threads) {
    const Matrix& w = *matrix;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
#endif
    {
#ifdef _OPENMP
        float* memory = scratch + omp_get_thread_num() * batch * w.columns;
#else
        float* memory = scratch;
#endif
        const Span rows = share(w.rows, 4);
        product(w, rows, given(w, x, batch, memory), batch, y, w.rows, false);
        if (then != NONE)
            for (int64_t b = 0; b < batch; b++)
                for (int64_t k = rows.from; k < rows.to; k++) y[b * w.rows + k] = gelu(then, y[b * w.rows + k]);
    }
}
}
