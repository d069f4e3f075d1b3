// The table of position biases on a CPU, in one pass over the offsets, forward and backward:
//
//   table = range sigmoid(second relu(first coordinates + bias))
//
// first (J, A), bias (J) and second (h, J) are float32 or bfloat16; everything else is float32, and so is all that is
// computed: J hidden numbers, a multiple of ROUND, A axes, h heads.
//
// Every result is the same bit for bit whatever the number of threads: offsets are cut into chunks by the sizes alone, a
// chunk adds up its offsets in order, and the caller adds up the chunks.

#include <algorithm>

#include "cpu_vectors.h"

namespace {

constexpr int TILE = 4;  // offsets at a time: their hidden numbers stay in the innermost cache

struct Table {
  long offsets, axes, hidden, heads;
  long chunks;  // of the offsets
  float range;
  long first(long chunk) const { return chunk * offsets / chunks; }
};

// The layers in float32, the first by its columns.
struct Layers {
  Floats first, bias, second;
};

template <typename T>
Floats wide(const T* x, long n) {
  Floats out(n);
  for (long i = 0; i < n; i += LANES) store(out.data() + i, widen(x + i));
  return out;
}

template <typename T>
Layers layers(const Table& s, const void* first, const void* bias, const void* second) {
  const Floats rows = wide(static_cast<const T*>(first), s.hidden * s.axes);
  Floats columns(s.hidden * s.axes);
  for (long j = 0; j < s.hidden; j++)
    for (long a = 0; a < s.axes; a++) columns[a * s.hidden + j] = rows[j * s.axes + a];
  return {columns, wide(static_cast<const T*>(bias), s.hidden), wide(static_cast<const T*>(second), s.heads * s.hidden)};
}

// hidden: (TILE, J) of the offsets from `from` on; of those from `end` on it is the last one's again.
void hidden_tile(const Table& s, const Layers& l, const float* coordinates, long from, long end, float* hidden) {
  for (long j = 0; j < s.hidden; j += LANES)
    for (long i = 0; i < TILE; i++) {
      const float* at = coordinates + std::min(from + i, end - 1) * s.axes;
      Vector v = load(&l.bias[j]);
      for (long a = 0; a < s.axes; a++) v += load(&l.first[a * s.hidden + j]) * at[a];
      store(hidden + i * s.hidden + j, v < Vector{} ? Vector{} : v);  // not a number stays
    }
}

void table_chunk(const Table& s, const Layers& l, const float* coordinates, float* table, long chunk) {
  const long end = s.first(chunk + 1);
  Floats hidden(TILE * s.hidden), logits((TILE * s.heads + ROUND - 1) / ROUND * ROUND);
  for (long from = s.first(chunk); from < end; from += TILE) {
    hidden_tile(s, l, coordinates, from, end, hidden.data());
    for (long head = 0; head < s.heads; head++) {
      Vector totals[TILE]{};
      for (long j = 0; j < s.hidden; j += LANES) {
        const Vector weight = load(&l.second[head * s.hidden + j]);
        for (long i = 0; i < TILE; i++) totals[i] += weight * load(&hidden[i * s.hidden + j]);
      }
      for (long i = 0; i < TILE; i++) logits[i * s.heads + head] = sum(totals[i]);
    }
    for (size_t i = 0; i < logits.size(); i += LANES) {
      const Vector x = load(&logits[i]), e = exponential(x > Vector{} ? -x : x);
      store(&logits[i], (x > Vector{} ? 1.0f + Vector{} : e) / (1.0f + e) * s.range);
    }
    std::copy_n(logits.begin(), std::min(end - from, long(TILE)) * s.heads, table + from * s.heads);
  }
}

// parts: of this chunk the gradients of second (h, J), of the columns of first (A, J) and of bias (J).
void table_gradient_chunk(const Table& s, const Layers& l, const float* coordinates, const float* table,
                          const float* grad, float* parts, long chunk) {
  const long end = s.first(chunk + 1), width = s.hidden;
  float *grad_first = parts + s.heads * width, *grad_bias = grad_first + s.axes * width;
  std::fill(parts, grad_bias + width, 0.0f);
  Floats hidden(TILE * width), logits(TILE * s.heads);
  for (long from = s.first(chunk); from < end; from += TILE) {
    hidden_tile(s, l, coordinates, from, end, hidden.data());
    std::fill(logits.begin(), logits.end(), 0.0f);
    for (long i = 0, at = from * s.heads; i < std::min(end - from, long(TILE)) * s.heads; i++, at++)
      logits[i] = grad[at] * table[at] * (1.0f - table[at] / s.range);
    for (long j = 0; j < width; j += LANES) {
      Vector out[TILE], back[TILE]{};
      for (long i = 0; i < TILE; i++) out[i] = load(&hidden[i * width + j]);
      for (long head = 0; head < s.heads; head++) {
        const Vector weight = load(&l.second[head * width + j]);
        Vector part = load(parts + head * width + j);
        for (long i = 0; i < TILE; i++) {
          const float logit = logits[i * s.heads + head];
          back[i] += weight * logit;
          part += out[i] * logit;
        }
        store(parts + head * width + j, part);
      }
      for (long i = 0; i < TILE; i++) {
        const float* at = coordinates + std::min(from + i, end - 1) * s.axes;
        const Vector through = out[i] <= Vector{} ? Vector{} : back[i];
        store(grad_bias + j, load(grad_bias + j) + through);
        for (long a = 0; a < s.axes; a++)
          store(grad_first + a * width + j, load(grad_first + a * width + j) + through * at[a]);
      }
    }
  }
}

}  // namespace

// All arrays are contiguous.  bfloat16: the type of the layers.  coordinates: (offsets, A).  table: (offsets, h).
extern "C" void position_table_forward(int bfloat16, const Table* s, const float* coordinates, const void* first,
                                       const void* bias, const void* second, float* table, int threads) {
  const Layers l = (bfloat16 ? layers<BFloat16> : layers<float>)(*s, first, bias, second);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s->chunks; chunk++) table_chunk(*s, l, coordinates, table, chunk);
}

// parts: (chunks, h + A + 1, J), one chunk's share of each gradient.
extern "C" void position_table_backward(int bfloat16, const Table* s, const float* coordinates, const void* first,
                                        const void* bias, const void* second, const float* table, const float* grad,
                                        float* parts, int threads) {
  const Layers l = (bfloat16 ? layers<BFloat16> : layers<float>)(*s, first, bias, second);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s->chunks; chunk++)
    table_gradient_chunk(*s, l, coordinates, table, grad, parts + chunk * (s->heads + s->axes + 1) * s->hidden, chunk);
}
