// Windowed cosine attention on a CPU, forward and backward, one window and head at a time.
//
// The same operation as the Triton kernels (fused_kernels.py): softmax(cos(q, k) scale + bias + mask) v inside the
// windows of a map, read from the projection (B, H, W, 3C) as it lies and written to (B, H, W, C); those of clips have
// (T, H, W).  A window's N x N scores stay in the cache of the core that computes them.  Everything is computed in
// float32, whatever the map's type.
//
// Legend: N tokens per window, d head dim; P and D are N and d rounded up to whole vectors.
//
// Every result is the same bit for bit whatever the number of threads: work is cut into chunks of windows by the sizes
// alone, a chunk adds up its windows in order, and the caller adds up the chunks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr float MASKED = -100.0f;  // between regions that the cyclic shift brought together
constexpr float END_OF_CLIP = 4.0f;  // regions from here on and those before have nothing to do with each other
constexpr float SMALLEST_LENGTH = 1e-12f;

// C = A B, or A^T B: a tile of ROWS x (VECTORS * LANES).  A is (m, k), of A^T (k, m); B (k, n); all row by row.
// Unrolled by command: a tile that a compiler leaves as a loop has its sums in memory.
template <bool TRANSPOSED, int ROWS, int VECTORS>
inline void tile(const float* a, long lda, const float* b, long ldb, float* c, long ldc, long depth) {
  Vector total[ROWS][VECTORS] = {};
  for (long k = 0; k < depth; k++) {
    Vector row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) row[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const float x = TRANSPOSED ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) total[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(c + m * ldc + v * LANES, total[m][v]);
}

// rows: a multiple of ROUND, which tiles of 6 rows leave to tiles of 4 in the end.
template <bool TRANSPOSED, int VECTORS>
inline void tiles(const float* a, long lda, const float* b, long ldb, float* c, long ldc, long rows, long depth) {
  constexpr int STEP = REGISTERS / VECTORS, LAST = ROUND % STEP ? 4 : STEP;
  long m = 0;
  for (long rest = rows; rest % LAST || rest > 2 * LAST; rest -= STEP, m += STEP)
    tile<TRANSPOSED, STEP, VECTORS>(TRANSPOSED ? a + m : a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth);
  for (; m < rows; m += LAST)
    tile<TRANSPOSED, LAST, VECTORS>(TRANSPOSED ? a + m : a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth);
}

// The product of matrices whose sides are multiples of ROUND.  Every entry is summed in the order of k.
template <bool TRANSPOSED>
void multiply(const float* a, long lda, const float* b, long ldb, float* c, long ldc, long rows, long cols, long depth) {
  long n = 0;
  if constexpr (MOST_VECTORS == 4)
    for (; n + 4 * LANES <= cols; n += 4 * LANES) tiles<TRANSPOSED, 4>(a, lda, b + n, ldb, c + n, ldc, rows, depth);
  for (; n + 2 * LANES <= cols; n += 2 * LANES) tiles<TRANSPOSED, 2>(a, lda, b + n, ldb, c + n, ldc, rows, depth);
  for (; n < cols; n += LANES) tiles<TRANSPOSED, 1>(a, lda, b + n, ldb, c + n, ldc, rows, depth);
}

// One of the steps that transpose LANES vectors: rows whose numbers differ by S alone exchange what lies S apart.
template <int S>
inline void exchange(Vector (&rows)[LANES]) {
  Integers lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const Integers upper = (lane & S) != 0, first = upper ? lane - S + LANES : lane, second = upper ? lane + LANES : lane + S;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) {
      const Vector a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shuffle(a, b, first);
      rows[i + S] = __builtin_shuffle(a, b, second);
    }
}

// (rows, cols) as (cols, rows), both multiples of ROUND.
void transpose(const float* x, long rows, long cols, float* y) {
  for (long i = 0; i < rows; i += LANES)
    for (long j = 0; j < cols; j += LANES) {
      Vector block[LANES];
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) block[k] = load(x + (i + k) * cols + j);
      exchange<1>(block);
      exchange<2>(block);
      exchange<4>(block);
      if constexpr (LANES == 16) exchange<8>(block);
#pragma GCC unroll 16
      for (int k = 0; k < LANES; k++) store(y + (j + k) * rows + i, block[k]);
    }
}

struct Sizes {
  long batch, map;         // images, and tokens of each
  long windows;            // of an image
  long frames, rows, cols;  // of a window; an image's has one frame
  long heads, dim;
  long chunks;             // of the windows of the batch
};

// What every chunk of a call reads.
template <typename T>
struct Map {
  Sizes size;
  const T* qkv;            // (B, H*W, 3C)
  const float* plus;       // (3C): of qkv, added as it is read; null where there is nothing to add
  const float* table;      // (heads, offsets)
  const int64_t* tokens;   // (windows, N): row of the map, -1 for padding
  const int8_t* regions;   // (windows, N): tokens of different numbers are kept apart
};

// One window and head: its place, and the buffers for what is computed of it.
template <typename T>
struct Window {
  const Map<T>& map;
  const Sizes& s;
  const long n, p, d, channels;
  long head = 0;
  const int64_t* tokens = nullptr;
  const int8_t* regions = nullptr;
  long first = 0;          // row of the image's first token in the batch
  bool apart = false;      // more than one region
  Floats bias;  // (N, P): of the head, -inf for what rounding up added
  Floats plus;  // (4, D): what is added to the head's queries, keys and values, and nothing
  Floats region;  // (P)
  Floats ends[2];  // (P) each, as seen from one of a clip's two ends: the other is as good as padding.
                               // Empty where they do not meet
  const float* seen = nullptr;  // the regions of the keys as the query at hand sees them

  explicit Window(const Map<T>& map)
      : map(map), s(map.size), n(s.frames * s.rows * s.cols), p((n + ROUND - 1) / ROUND * ROUND),
        d((s.dim + ROUND - 1) / ROUND * ROUND), channels(s.heads * s.dim), bias(n * p), plus(4 * d), region(p) {}

  long offsets() const { return (2 * s.frames - 1) * (2 * s.rows - 1) * (2 * s.cols - 1); }

  // Where the table holds the bias of a query towards the first key of a row; that of the next key lies one before.
  inline long place(long query, long key_frame, long key_row) const {
    const long col = query % s.cols + s.cols - 1, line = query / s.cols;
    const long row = line % s.rows - key_row + s.rows - 1, frame = line / s.rows - key_frame + s.frames - 1;
    return (frame * (2 * s.rows - 1) + row) * (2 * s.cols - 1) + col;
  }

  void take_head(long which, const float* table) {
    head = which;
    if (map.plus)
      for (long part = 0; part < 3; part++) {
        const float* from = map.plus + part * channels + head * s.dim;
        std::copy(from, from + s.dim, &plus[part * d]);
      }
    for (long i = 0; i < n; i++) {
      float* row = &bias[i * p];
      for (long f = 0, j = 0; f < s.frames; f++)
        for (long r = 0; r < s.rows; r++, j += s.cols) {
          const float* from = table + place(i, f, r);
          for (long c = 0; c < s.cols; c++) row[j + c] = from[-c];
        }
      std::fill(row + n, row + p, -INFINITY);
    }
  }

  // index: of the window in the batch.
  void take(long index) {
    const long image = index / s.windows, window = index % s.windows;
    first = image * s.map;
    tokens = map.tokens + window * n;
    regions = map.regions + window * n;
    apart = false;
    bool meet = false;
    for (long j = 0; j < n; j++) {
      region[j] = regions[j];
      apart |= regions[j] != regions[0];
      meet |= region[j] >= END_OF_CLIP;
    }
    seen = region.data();
    for (long end = 0; end < 2; end++) {
      ends[end] = meet ? region : Floats();
      for (float& each : ends[end])
        if ((each >= END_OF_CLIP) != end) each = -1.0f;
    }
  }

  void take_query(long i) {
    if (!ends[0].empty()) seen = region[i] < 0 ? region.data() : ends[region[i] >= END_OF_CLIP].data();
  }

  // The window's rows of a map of `width` channels, beginning at channel `from`, into (P, D), zero where there is none;
  // part: the row of `plus` that is added.
  void read(const T* x, long width, long from, float* y, long part) const {
    const long whole = s.dim / LANES * LANES;
    const float* add = &plus[part * d];
    for (long i = 0; i < n; i++, y += d) {
      if (tokens[i] < 0) {
        std::fill(y, y + d, 0.0f);
        continue;
      }
      const T* row = x + (first + tokens[i]) * width + from + head * s.dim;
      for (long c = 0; c < whole; c += LANES) store(y + c, widen(row + c) + load(add + c));
      if (whole < s.dim) {
        T rest[LANES] = {};
        std::copy(row + whole, row + s.dim, rest);
        store(y + whole, widen(rest) + load(add + whole));
      }
    }
  }

  // The inverse of read().
  void write(const float* x, T* y, long width, long from) const {
    const long whole = s.dim / LANES * LANES;
    for (long i = 0; i < n; i++, x += d) {
      if (tokens[i] < 0) continue;
      T* row = y + (first + tokens[i]) * width + from + head * s.dim;
      for (long c = 0; c < whole; c += LANES) narrow(load(x + c), row + c);
      if (whole < s.dim) {
        T rest[LANES];
        narrow(load(x + whole), rest);
        std::copy(rest, rest + s.dim - whole, row + whole);
      }
    }
  }

  // Add the window's rows x (P, D) to sums (D).
  void add_rows(const float* x, float* sums) const {
    for (long i = 0; i < n; i++, x += d)
      if (tokens[i] >= 0)
        for (long c = 0; c < d; c += LANES) store(sums + c, load(sums + c) + load(x + c));
  }

  // Ask for what read() of window `index` will read of its token i, or, to WRITE, what write() of this one writes: a map
  // is read in rows of a head's channels, too short for the processor to see what comes next.
  template <bool WRITE>
  __attribute__((always_inline)) void prefetch(const T* x, long width, long from, long index, long i) const {
    if (index >= s.batch * s.windows) return;
    const long token = map.tokens[index % s.windows * n + i];
    const T* row = x + (index / s.windows * s.map + std::max(token, 0L)) * width + from + head * s.dim;
    for (long c = 0; c < s.dim; c += LINE_BYTES / sizeof(T)) __builtin_prefetch(row + c, WRITE, 2);
  }

  // 1 / length of the rows of (P, D), bounded as torch's normalize bounds it.  A row whose squared length is beyond
  // float32 becomes 0, as there: its length counts as infinite, and its products with others would be.
  void inverse_lengths(float* x, float* inverse) const {
    for (long i = 0; i < p; i++, x += d) {
      Vector squares{};
      for (long c = 0; c < d; c += LANES) squares += load(x + c) * load(x + c);
      inverse[i] = sum(squares);
      if (inverse[i] == INFINITY)
        for (long c = 0; c < d; c++) x[c] /= INFINITY;
    }
    for (long i = 0; i < p; i++) inverse[i] = 1.0f / std::max(std::sqrt(inverse[i]), SMALLEST_LENGTH);
  }

  // The gradient of rows x from `factor` times that of x / |x|, which is divided by |x| already; in place.  Returns the
  // sum of the products of both, without the factor.
  float through_unit(const float* x, const float* inverse, float factor, float* gradient) const {
    float total = 0;
    for (long i = 0; i < n; i++, x += d, gradient += d) {
      Vector products{};
      for (long c = 0; c < d; c += LANES) products += load(gradient + c) * load(x + c);
      const float product = sum(products);
      const float along = inverse[i] * SMALLEST_LENGTH < 1.0f ? product * inverse[i] * inverse[i] : 0.0f;
      for (long c = 0; c < d; c += LANES) store(gradient + c, (load(gradient + c) - load(x + c) * along) * factor);
      total += product;
    }
    return total;
  }

  // bias + mask between query i and the keys from j on.
  inline Vector added(long i, long j) const {
    Vector x = load(&bias[i * p + j]);
    if (apart) {
      const Vector theirs = load(seen + j);
      x += theirs != fill(region[i]) ? fill(MASKED) : Vector{};
      x = theirs == fill(-1.0f) ? fill(-INFINITY) : x;
    }
    return x;
  }
};

template <typename T>
void forward_chunk(const Map<T>& map, const float* scale, T* out, float* lse, long chunk, long head) {
  Window<T> w(map);
  const Sizes& s = map.size;
  const long total = s.batch * s.windows, n = w.n, p = w.p, d = w.d;
  Floats q(p * d), k(p * d), kt(p * d), v(p * d), scores(p * p), o(p * d), of_query(p), of_key(p);
  w.take_head(head, map.table + head * w.offsets());
  for (long index = chunk * total / s.chunks; index < (chunk + 1) * total / s.chunks; index++) {
    w.take(index);
    w.read(map.qkv, 3 * w.channels, 0, q.data(), 0);
    w.read(map.qkv, 3 * w.channels, w.channels, k.data(), 1);
    w.read(map.qkv, 3 * w.channels, 2 * w.channels, v.data(), 2);
    w.inverse_lengths(q.data(), of_query.data());
    w.inverse_lengths(k.data(), of_key.data());
    transpose(k.data(), p, d, kt.data());
    multiply<false>(q.data(), d, kt.data(), p, scores.data(), p, p, p, d);
    for (long i = 0; i < n; i++) {
      w.take_query(i);
      for (long part = 0; part < 3; part++)
        w.template prefetch<false>(map.qkv, 3 * w.channels, part * w.channels, index + 1, i);
      w.template prefetch<true>(out, w.channels, 0, index, i);
      float* row = &scores[i * p];
      const float factor = scale[head] * of_query[i];
      Vector highest = fill(-INFINITY);
      for (long j = 0; j < p; j += LANES) {
        const Vector x = load(row + j) * load(&of_key[j]) * factor + w.added(i, j);
        store(row + j, x);
        highest = x > highest ? x : highest;
      }
      const float most = largest(highest);
      Vector totals{};
      for (long j = 0; j < p; j += LANES) {
        const Vector e = exponential(load(row + j) - most);
        store(row + j, e);
        totals += e;
      }
      of_query[i] = 1.0f / sum(totals);  // no longer needed for the query
      lse[(index * s.heads + head) * n + i] = most - std::log(of_query[i]);
    }
    multiply<false>(scores.data(), p, v.data(), d, o.data(), d, p, d, p);
    for (long i = 0; i < n; i++)
      for (long c = 0; c < d; c += LANES) store(&o[i * d + c], load(&o[i * d + c]) * of_query[i]);
    w.write(o.data(), out, w.channels, 0);
  }
}

template <typename T>
void backward_chunk(const Map<T>& map, const float* scale, const T* grad, const float* lse, T* grad_qkv,
                    float* grad_scale, float* grad_table, float* grad_plus, long chunk, long head) {
  Window<T> w(map);
  const Sizes& s = map.size;
  const long total = s.batch * s.windows, n = w.n, p = w.p, d = w.d;
  Floats q(p * d), k(p * d), v(p * d), across(p * d), go(p * d), gv(p * d), gq(p * d), gk(p * d);
  Floats weights(p * p), gradient(p * p), sums(n * p), of_query(p), of_key(p), plus_sums(3 * d);
  w.take_head(head, map.table + head * w.offsets());
  float scale_sum = 0;
  for (long index = chunk * total / s.chunks; index < (chunk + 1) * total / s.chunks; index++) {
    w.take(index);
    w.read(map.qkv, 3 * w.channels, 0, q.data(), 0);
    w.read(map.qkv, 3 * w.channels, w.channels, k.data(), 1);
    w.read(map.qkv, 3 * w.channels, 2 * w.channels, v.data(), 2);
    w.read(grad, w.channels, 0, go.data(), 3);
    w.inverse_lengths(q.data(), of_query.data());
    w.inverse_lengths(k.data(), of_key.data());
    transpose(k.data(), p, d, across.data());
    multiply<false>(q.data(), d, across.data(), p, weights.data(), p, p, p, d);
    transpose(v.data(), p, d, across.data());
    multiply<false>(go.data(), d, across.data(), p, gradient.data(), p, p, p, d);
    for (long i = 0; i < n; i++) {
      w.take_query(i);
      for (long part = 0; part < 3; part++) {
        w.template prefetch<false>(map.qkv, 3 * w.channels, part * w.channels, index + 1, i);
        w.template prefetch<true>(grad_qkv, 3 * w.channels, part * w.channels, index, i);
      }
      w.template prefetch<false>(grad, w.channels, 0, index + 1, i);
      const float denominator = lse[(index * s.heads + head) * n + i];
      const float factor = scale[head] * of_query[i];
      Vector products{};
      for (long j = 0; j < p; j += LANES) {
        const Vector cosine = load(&weights[i * p + j]) * load(&of_key[j]);
        const Vector e = exponential(cosine * factor + w.added(i, j) - denominator);
        store(&weights[i * p + j], e);
        products += e * load(&gradient[i * p + j]);
      }
      const float delta = sum(products);  // grad . out, of an out that was not rounded to the map's type
      for (long j = 0; j < p; j += LANES) {
        const Vector g = load(&weights[i * p + j]) * (load(&gradient[i * p + j]) - delta);
        store(&gradient[i * p + j], g * load(&of_key[j]) * of_query[i]);
        store(&sums[i * p + j], load(&sums[i * p + j]) + g);
      }
    }
    std::fill(weights.begin() + n * p, weights.end(), 0.0f);
    std::fill(gradient.begin() + n * p, gradient.end(), 0.0f);
    multiply<true>(weights.data(), p, go.data(), d, gv.data(), d, p, d, p);
    w.write(gv.data(), grad_qkv, 3 * w.channels, 2 * w.channels);
    multiply<false>(gradient.data(), p, k.data(), d, gq.data(), d, p, d, p);
    multiply<true>(gradient.data(), p, q.data(), d, gk.data(), d, p, d, p);
    scale_sum += w.through_unit(q.data(), of_query.data(), scale[head], gq.data());
    w.through_unit(k.data(), of_key.data(), scale[head], gk.data());
    for (long part = 0; grad_plus && part < 3; part++)
      w.add_rows((part == 0 ? gq : part == 1 ? gk : gv).data(), &plus_sums[part * d]);
    w.write(gq.data(), grad_qkv, 3 * w.channels, 0);
    w.write(gk.data(), grad_qkv, 3 * w.channels, w.channels);
  }
  grad_scale[chunk * s.heads + head] = scale_sum;
  for (long part = 0; grad_plus && part < 3; part++)
    std::copy(&plus_sums[part * d], &plus_sums[part * d] + s.dim,
              grad_plus + (chunk * 3 + part) * w.channels + head * s.dim);
  float* table = grad_table + (chunk * s.heads + head) * w.offsets();
  for (long i = 0; i < n; i++)
    for (long f = 0, j = i * p; f < s.frames; f++)
      for (long r = 0; r < s.rows; r++, j += s.cols) {
        float* to = table + w.place(i, f, r);
        for (long c = 0; c < s.cols; c++) to[-c] += sums[j + c];
      }
}

template <typename T>
void forward(const Sizes& s, const void* qkv, const float* scale, const float* table, const int64_t* tokens,
             const int8_t* regions, void* out, float* lse, const float* plus, int threads) {
  const Map<T> map{s, static_cast<const T*>(qkv), plus, table, tokens, regions};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long item = 0; item < s.chunks * s.heads; item++)
    forward_chunk(map, scale, static_cast<T*>(out), lse, item / s.heads, item % s.heads);
}

template <typename T>
void backward(const Sizes& s, const void* qkv, const float* scale, const float* table, const int64_t* tokens,
              const int8_t* regions, const void* grad, const float* lse, void* grad_qkv,
              float* grad_scale, float* grad_table, const float* plus, float* grad_plus, int threads) {
  const Map<T> map{s, static_cast<const T*>(qkv), plus, table, tokens, regions};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long item = 0; item < s.chunks * s.heads; item++)
    backward_chunk(map, scale, static_cast<const T*>(grad), lse, static_cast<T*>(grad_qkv), grad_scale,
                    grad_table, grad_plus, item / s.heads, item % s.heads);
}

}  // namespace

// All arrays are contiguous.  bfloat16: the type of qkv, out and their gradients; everything else is float32.
// plus (3C): added to every row of qkv before anything else; null = nothing.
extern "C" void window_attention_forward(int bfloat16, const Sizes* s, const void* qkv, const float* scale,
                                         const float* table, const int64_t* tokens, const int8_t* regions, void* out,
                                         float* lse, const float* plus, int threads) {
  (bfloat16 ? forward<BFloat16> : forward<float>)(*s, qkv, scale, table, tokens, regions, out, lse, plus, threads);
}

// grad_scale (chunks, heads), grad_table (chunks, heads, offsets), zeroed by the caller, and grad_plus (chunks, 3C) are
// one chunk's share each; grad_plus may be null.
extern "C" void window_attention_backward(int bfloat16, const Sizes* s, const void* qkv, const float* scale,
                                          const float* table, const int64_t* tokens, const int8_t* regions,
                                          const void* grad, const float* lse, void* grad_qkv,
                                          float* grad_scale, float* grad_table, const float* plus, float* grad_plus,
                                          int threads) {
  (bfloat16 ? backward<BFloat16> : backward<float>)(*s, qkv, scale, table, tokens, regions, grad, lse, grad_qkv,
                                                    grad_scale, grad_table, plus, grad_plus, threads);
}
