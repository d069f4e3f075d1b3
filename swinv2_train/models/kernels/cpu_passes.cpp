// What lies between a block's matrix products on a CPU, each in one pass over its rows:
//
//   out = residual + factor norm(branch + plus)    the bias of the branch's last layer, LayerNorm, the factor of a
//                                                  sample's stochastic depth, the residual; forward and backward
//   y = gelu(x + plus)                             the bias of the layer before and the exact (erf) GELU; forward and
//                                                  backward
//
// Maps (branch, residual, x, y and their gradients) and parameters (plus, weight, bias) are float32 or bfloat16;
// everything else is float32, and so is all that is computed.  Channels are a multiple of ROUND.
//
// Every result is the same bit for bit whatever the number of threads: rows are cut into chunks by the sizes alone, a
// chunk adds up its rows in order, and the caller adds up the chunks.

#include <algorithm>
#include <cmath>

#include "cpu_vectors.h"

namespace {

struct Rows {
  long rows, channels;
  long of_sample;  // rows that share a factor
  long chunks;     // of the rows
  float eps;
  long first(long chunk) const { return chunk * rows / chunks; }
};

template <typename T>
void norm_chunk(const Rows& s, const T* branch, const T* plus, const T* residual, const float* factors,
                const T* weight, const T* bias, T* out, float* means, float* inverses, long chunk) {
  const long c = s.channels;
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const T *x = branch + row * c, *add = residual + row * c;
    T* y = out + row * c;
    Vector total{}, squares{};
    for (long j = 0; j < c; j += LANES) total += widen(x + j) + widen(plus + j);
    const float mean = sum(total) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector apart = widen(x + j) + widen(plus + j) - mean;
      squares += apart * apart;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / c + s.eps);
    const float factor = factors ? factors[row / s.of_sample] : 1.0f;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + widen(plus + j) - mean) * inverse * widen(weight + j) + widen(bias + j);
      narrow(widen(add + j) + normed * factor, y + j);
    }
    means[row] = mean;
    inverses[row] = inverse;
  }
}

// grad_weight, grad_bias and grad_plus: (C) each, of this chunk.
template <typename T>
void norm_gradient_chunk(const Rows& s, const T* grad, const T* branch, const T* plus, const float* factors,
                         const T* weight, const float* means, const float* inverses, T* grad_branch,
                         float* grad_weight, float* grad_bias, float* grad_plus, long chunk) {
  const long c = s.channels;
  std::fill(grad_weight, grad_weight + c, 0.0f);
  std::fill(grad_bias, grad_bias + c, 0.0f);
  std::fill(grad_plus, grad_plus + c, 0.0f);
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const T *x = branch + row * c, *g = grad + row * c;
    T* to = grad_branch + row * c;
    const float mean = means[row], inverse = inverses[row], factor = factors ? factors[row / s.of_sample] : 1.0f;
    Vector total{}, along{};
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + widen(plus + j) - mean) * inverse, each = widen(g + j) * factor;
      const Vector weighted = each * widen(weight + j);
      total += weighted;
      along += weighted * normed;
      store(grad_weight + j, load(grad_weight + j) + each * normed);
      store(grad_bias + j, load(grad_bias + j) + each);
    }
    const float shift = sum(total) / c, share = sum(along) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + widen(plus + j) - mean) * inverse;
      const Vector made = (widen(g + j) * factor * widen(weight + j) - shift - normed * share) * inverse;
      narrow(made, to + j);
      store(grad_plus + j, load(grad_plus + j) + made);
    }
  }
}

// The normal distribution below x, and its density there.  With t = 1 / (1 + 0.266 |x|), the tail beyond |x| is
// e^(-x^2/2) t Q(t); Q was fitted at Chebyshev's points to 2e-8 of the tail for |x| up to 13, where e^(-x^2/2) ends.
inline void normal(Vector x, Vector& below, Vector& density) {
  const Vector size = x < Vector{} ? -x : x;
  const Vector t = 1.0f / (size * 0.266f + 1.0f);
  const Vector e = exponential(x * x * -0.5f);
  Vector q = fill(0.03095846997f);
  q = q * t - 0.1430754529f;
  q = q * t + 0.2128828768f;
  q = q * t - 0.1120816122f;
  q = q * t + 0.1354402016f;
  q = q * t + 0.06117707742f;
  q = q * t + 0.1029058735f;
  q = q * t + 0.1056519921f;
  q = q * t + 0.1061405812f;
  const Vector tail = q * t * e;
  below = x > Vector{} ? 1.0f - tail : tail;
  density = e * 0.3989422804f;
}

template <typename T>
void gelu_chunk(const Rows& s, const T* x, const T* plus, T* y, long chunk) {
  const long c = s.channels;
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++)
    for (long j = 0, i = row * c; j < c; j += LANES, i += LANES) {
      const Vector at = widen(x + i) + widen(plus + j);
      Vector below, density;
      normal(at, below, density);
      narrow(at * below, y + i);
    }
}

// grad_plus: (C), of this chunk.
template <typename T>
void gelu_gradient_chunk(const Rows& s, const T* grad, const T* x, const T* plus, T* grad_x, float* grad_plus,
                         long chunk) {
  const long c = s.channels;
  std::fill(grad_plus, grad_plus + c, 0.0f);
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++)
    for (long j = 0, i = row * c; j < c; j += LANES, i += LANES) {
      const Vector at = widen(x + i) + widen(plus + j);
      Vector below, density;
      normal(at, below, density);
      const Vector made = widen(grad + i) * (below + at * density);
      narrow(made, grad_x + i);
      store(grad_plus + j, load(grad_plus + j) + made);
    }
}

template <typename T>
void whole_norm(const Rows& s, const void* branch, const void* plus, const void* residual, const float* factors,
          const void* weight, const void* bias, void* out, float* means, float* inverses, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s.chunks; chunk++)
    norm_chunk(s, static_cast<const T*>(branch), static_cast<const T*>(plus), static_cast<const T*>(residual), factors,
               static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(out), means, inverses,
               chunk);
}

template <typename T>
void whole_norm_gradient(const Rows& s, const void* grad, const void* branch, const void* plus, const float* factors,
                         const void* weight, const float* means, const float* inverses, void* grad_branch,
                         float* grad_weight, float* grad_bias, float* grad_plus, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s.chunks; chunk++) {
    const long at = chunk * s.channels;
    norm_gradient_chunk(s, static_cast<const T*>(grad), static_cast<const T*>(branch), static_cast<const T*>(plus),
                        factors, static_cast<const T*>(weight), means, inverses, static_cast<T*>(grad_branch),
                        grad_weight + at, grad_bias + at, grad_plus + at, chunk);
  }
}

template <typename T>
void whole_gelu(const Rows& s, const void* x, const void* plus, void* y, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s.chunks; chunk++)
    gelu_chunk(s, static_cast<const T*>(x), static_cast<const T*>(plus), static_cast<T*>(y), chunk);
}

template <typename T>
void whole_gelu_gradient(const Rows& s, const void* grad, const void* x, const void* plus, void* grad_x,
                         float* grad_plus, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s.chunks; chunk++)
    gelu_gradient_chunk(s, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(plus),
                        static_cast<T*>(grad_x), grad_plus + chunk * s.channels, chunk);
}

}  // namespace

// All arrays are contiguous.  bfloat16: the type of maps and parameters.

// factors may be null: all are 1.
extern "C" void add_norm_forward(int bfloat16, const Rows* s, const void* branch, const void* plus,
                                 const void* residual, const float* factors, const void* weight, const void* bias,
                                 void* out, float* means, float* inverses, int threads) {
  (bfloat16 ? whole_norm<BFloat16> : whole_norm<float>)(*s, branch, plus, residual, factors, weight, bias, out, means,
                                                        inverses, threads);
}

// grad_weight, grad_bias, grad_plus: (chunks, C), one chunk's share each.  The residual's gradient is grad.
extern "C" void add_norm_backward(int bfloat16, const Rows* s, const void* grad, const void* branch, const void* plus,
                                  const float* factors, const void* weight, const float* means, const float* inverses,
                                  void* grad_branch, float* grad_weight, float* grad_bias, float* grad_plus,
                                  int threads) {
  (bfloat16 ? whole_norm_gradient<BFloat16> : whole_norm_gradient<float>)(
      *s, grad, branch, plus, factors, weight, means, inverses, grad_branch, grad_weight, grad_bias, grad_plus, threads);
}

extern "C" void gelu_forward(int bfloat16, const Rows* s, const void* x, const void* plus, void* y, int threads) {
  (bfloat16 ? whole_gelu<BFloat16> : whole_gelu<float>)(*s, x, plus, y, threads);
}

// grad_plus: (chunks, C), one chunk's share each.
extern "C" void gelu_backward(int bfloat16, const Rows* s, const void* grad, const void* x, const void* plus,
                              void* grad_x, float* grad_plus, int threads) {
  (bfloat16 ? whole_gelu_gradient<BFloat16> : whole_gelu_gradient<float>)(*s, grad, x, plus, grad_x, grad_plus, threads);
}
